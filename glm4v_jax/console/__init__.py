"""What the commands of all programs share.

- `program`: a program as a table of commands: how one is found and run, exit statuses, errors in one line.
- `option_help`: how options are shown in help, and numbers are read.
- `streams`: standard output and standard error: what is dropped, escaped, or put into a line.
- `interrupts`: Ctrl-C that stops an answer, and Ctrl-C while a program is importing.
- `extras`: the extras of this package, and the one that brings a missing package.
- `options`: the groups of options for the model, media and sampling, and checks of files.
- `distributed`: the options for several processes, and how a command runs on them.
- `progress`: the progress bar and the spinner, on standard error.
- `table`: the table printer.
- `answer_writer`: an answer on its way to the screen.
"""
