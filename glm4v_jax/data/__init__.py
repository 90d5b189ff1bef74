"""Rows of data files, with their images and videos; shared by training and evaluation.

tables.py    the rows of JSON, JSON lines, Parquet and TSV files, each with its place
media.py     images and videos of a row, in any spelling, as items of chat templates
"""
