"""One browser for all pages, which fails a test whose page says anything or asks for anything but itself."""

import shutil

import pytest

CHROMIUM = "/usr/bin/chromium"
QUIETLY = ["disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
ARGUMENTS = [f"--{name}" for name in ("headless", "no-sandbox", "disable-gpu", *QUIETLY)]


class Browser:
    """Tabs of one browser, and what went wrong in them."""

    def __init__(self, context):
        self.context, self.tab = context, None
        self.asked, self.trouble = set(), []

    def new_tab(self):
        tab = self.context.new_page()
        tab.on("console", lambda message: self.trouble.append(message.text))
        tab.on("pageerror", lambda error: self.trouble.append(str(error)))
        tab.on("request", lambda request: request.url in self.asked or self.trouble.append(request.url))
        return tab

    def open(self, path, tab=None, *, width=1280, height=720, color_scheme="light", reduced_motion="no-preference"):
        """Show a file, by default in the tab that showed the one before."""
        if tab is None:
            tab = self.tab = self.tab or self.new_tab()
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme=color_scheme, reduced_motion=reduced_motion)
        self.asked.add(path.as_uri())
        tab.goto(path.as_uri())
        return tab


@pytest.fixture(scope="session")
def chromium():
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        process = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield Browser(process.new_context())
        process.close()


@pytest.fixture
def browser(chromium):
    yield chromium
    trouble, chromium.trouble[:] = list(chromium.trouble), []
    assert trouble == []
