"""What tests of pages share: a hostile text, and a reader of what a page holds."""

import html.parser
import json

HOSTILE = (
    "</script><script>window.broken=1</script><!--<img src=x onerror=window.broken=1>&lt;${1}$x_1^${{data}}\u202eשלום🙂"
)
"""Would end a script, run another or fill in a template, if it were anything but text."""


class Reader(html.parser.HTMLParser):
    """The elements of a page, and what its JSON holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.json = [], False, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = ("type", "application/json") in attrs

    def handle_data(self, data):
        self.json += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False

    @property
    def data(self):
        return json.loads(self.json)
