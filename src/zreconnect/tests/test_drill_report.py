"""The report of a drill as a browser shows it: in both colour schemes, by keyboard, printed."""

from __future__ import annotations

import contextlib
import tempfile
import unittest
from pathlib import Path

from zreconnect.cli.drill.report import report
from zreconnect.tests.chromium import Page, on_chromium
from zreconnect.tests.test_drill import some_result

# The smallest contrast of a text with what is behind it, as WCAG 2 has it, with the text.
CONTRAST = """
(() => {
  const numbers = text => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(each => {
    each /= 255;
    return each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, each, n) => sum + each * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const mark = element.localName === 'a' && element.querySelector('.mark');
      const colour = mark ? getComputedStyle(mark).fill : getComputedStyle(element).backgroundColor;
      const found = numbers(colour);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isToldOnly = ['title', 'desc'].includes(element.localName);
    if (isToldOnly || !element.getClientRects().length) continue;
    if (!walker.currentNode.textContent.trim()) continue;
    const style = getComputedStyle(element);
    const drawn = numbers(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [dark, bright] = [light(drawn), light(behind(element))].sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < worst[0]) worst = [contrast, walker.currentNode.textContent];
  }
  return worst;
})()
"""
GROUND = "getComputedStyle(document.body).backgroundColor"
FOCUSED = "document.activeElement.getAttribute('href')"


class ReportLayer:
    """A layer: the report in a browser."""

    @classmethod
    def setUp(cls):
        with contextlib.ExitStack() as stack:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "report.html")
            path.write_text(report(some_result(findings=[("7", "2")])), encoding="utf-8")
            cls.page = stack.enter_context(Page(path.as_uri()))
            cls.opened = stack.pop_all()

    @classmethod
    def tearDown(cls):
        cls.opened.close()


@on_chromium
class BrowserTests(unittest.TestCase):
    layer = ReportLayer

    def setUp(self):
        self.page = self.layer.page
        self.page.media()
        self.page.width(1280)

    def test_it_asks_for_nothing_and_complains_of_nothing(self):
        self.assertEqual({url.partition(":")[0] for url in self.page.requests}, {"file"})
        self.assertEqual(self.page.log, [])

    def test_light_and_dark_can_be_read(self):
        grounds = set()
        for scheme in ("light", "dark"):
            self.page.media(scheme=scheme)
            grounds.add(self.page.value(GROUND))
            contrast, text = self.page.value(CONTRAST)
            self.assertGreaterEqual(contrast, 4.5, (scheme, text))
        self.assertEqual(grounds, {"rgb(255, 255, 255)", "rgb(20, 23, 27)"})

    def test_print_is_black_on_white_and_fits(self):
        self.page.media("print", "dark")
        self.assertEqual(self.page.value(GROUND), "rgb(255, 255, 255)")
        self.page.width(720)
        self.assertLessEqual(
            self.page.value("document.querySelector('.wide svg').clientWidth"), 720
        )
        self.assertTrue(self.page.pdf().startswith(b"%PDF"))

    def test_by_keyboard(self):
        self.page.value("location.hash = ''; document.activeElement.blur()")
        self.page.value("getSelection().removeAllRanges(); window.scrollTo(0, 0)")
        seen = []
        for _ in range(7):
            self.page.press("Tab")
            seen.append(self.page.value(FOCUSED))
        marks = [f"#fault-{number}" for number in range(1, 5)]
        self.assertEqual([each for each in seen if each in marks], marks)
        self.page.value("document.getElementById('mark-2').focus()")
        self.page.press("Enter")
        self.assertEqual(self.page.value("document.querySelector(':target').id"), "fault-2")
        # From a row the next is its link, which leads back.
        self.page.press("Tab")
        self.assertEqual(self.page.value(FOCUSED), "#mark-2")
        self.page.press("Enter")
        self.assertEqual(self.page.value("document.querySelector(':target').id"), "mark-2")

    def test_by_screen_reader(self):
        read = self.page.accessible()
        names = {role: [name for each, name in read if each == role] for role, _ in read}
        self.assertIn("Fault 2 at 2.0 s, restart: ended with status 1", names["link"])
        self.assertIn("transactions per second, and the faults", " ".join(names["group"]))
        self.assertIn("Timeline", names["region"])
        self.assertEqual(names["heading"][0], "Does it survive?")
        self.assertEqual(len(names["main"]), 1)
        self.assertTrue(all(names["link"]))
        self.assertIn("What became of it", names["columnheader"])
        self.assertIn("2, to its mark in the timeline", names["rowheader"])

    def test_a_narrow_window(self):
        self.page.width(380)
        self.assertLessEqual(self.page.value("document.documentElement.scrollWidth"), 380)
