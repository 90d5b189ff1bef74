"""Items of an evaluation, and how rows of data become items.

items.py      an item: its prompt, and what is known of the right answer
questions.py  a question of a data set, and the item that a task's template makes of it
fields.py     the fields of a row, each checked
rows.py       our own rows
adapters.py   public data sets in the files in which they are published
digits.py     the data of the package
"""
