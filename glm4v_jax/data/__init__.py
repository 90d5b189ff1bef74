"""Rows of data files, with their images and videos; shared by training and evaluation.

tables.py    the rows of data files (JSON, JSON lines, Parquet, Arrow, CSV, TSV), each with its place
media.py     images and videos of a row, in any spelling, as items of chat templates
"""
