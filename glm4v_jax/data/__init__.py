"""Rows of data files, with their images and videos; shared by training and evaluation."""
