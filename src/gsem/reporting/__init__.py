"""Reports of runs that people read: one page, Markdown, a JSON card. It computes nothing of a model (see `gallery`)."""

from gsem.reporting.page import cards as cards
from gsem.reporting.page import html as html
from gsem.reporting.page import markdown as markdown
from gsem.reporting.read import read_runs as read_runs
from gsem.reporting.views import Entry as Entry
from gsem.reporting.views import Pictures as Pictures
from gsem.reporting.views import Shown as Shown
from gsem.reporting.views import Surface as Surface
