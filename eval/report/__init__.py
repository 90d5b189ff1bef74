"""The report of a run as one HTML page.

report.py      fills report.html.jinja, with report.css and report.js in it
thumbnails.py  small copies of the images and videos of a prompt
"""
