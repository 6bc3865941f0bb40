"""Pieces of Markdown that pages are made of; what comes from a record goes through one of them, or through a table."""
import html
import re
from urllib.parse import quote

from nbutils.records import Markdown, Table, escape_markdown, printable


def table(header, rows):
    """A Markdown table, in which only what is Markdown already is not escaped."""
    return Table([str(text) for text in header], rows).to_markdown()


def heading(text):
    """A text in a heading, where most marks become "?": Sphinx's search page shows headings as HTML, escaped or not."""
    return escape_markdown(re.sub(r"[^A-Za-z0-9 _.,:;+=()/@%'-]", "?", printable(text, 100)))


def code(text):
    """A text in the type of code; as plain text if it has more than letters, digits and _ . + - in it."""
    return Markdown(f"`{text}`") if re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", str(text)) else escape_markdown(text)


def record_link(path, text="record"):
    """A link to a file below book/records, from a page beside that folder."""
    address = html.escape(quote(f"../records/{path}"))
    return Markdown(f'<a href="{address}">{escape_markdown(text)}</a>')
