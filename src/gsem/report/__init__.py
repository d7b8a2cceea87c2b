"""Reports of runs that people read: one page, Markdown, a JSON card. It computes nothing of a model (see `gallery`)."""

from gsem.report.page import cards as cards
from gsem.report.page import html as html
from gsem.report.page import markdown as markdown
from gsem.report.read import read_runs as read_runs
from gsem.report.record import Entry as Entry
from gsem.report.record import Pictures as Pictures
from gsem.report.record import Shown as Shown
from gsem.report.record import Surface as Surface
