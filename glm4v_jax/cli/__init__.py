"""The commands of `glm4v`.

- `main`: the table of commands, and the program.
- `generate`, `describe`, `inspect`, `mesh`, `cache`, `doctor`: one command each.
- `chat`: a conversation in the terminal. `serve`: a server.
"""
