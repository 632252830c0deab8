"""Faults that a reader would see on a page that a browser shows: cut off, pale, without a name."""

import json

from tests.support.browser import Browser

LEAST_CONTRAST = 4.5
"""Of a text and what is behind it: WCAG 2.2, success criterion 1.4.3."""

_LOOK = r"""
(({within, scrollers, least}) => {
  const found = new Set();
  const root = document.documentElement;
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  if (root.scrollWidth > root.clientWidth)
    found.add(`the page is ${root.scrollWidth} wide and its window ${root.clientWidth}`);

  const shown = (e) => e.getClientRects().length > 0
    && e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const named = (e) => `${e.tagName.toLowerCase()}${[...e.classList].map((c) => `.${c}`).join("")}`
    + ` "${(e.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40)}"`;
  const parts = [...document.querySelectorAll(within)]
    .flatMap((part) => [part, ...part.querySelectorAll("*")])
    .filter((e) => shown(e) && !["SCRIPT", "STYLE", "TITLE"].includes(e.tagName));

  // Cut off: by a box that hides what does not fit, or by the window's edge.
  const clips = (value) => value === "hidden" || value === "clip";
  for (const e of parts.filter((e) => !e.closest("svg"))) {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    const scrolls = scrollers && e.closest(scrollers);
    if (scrolls || style.display === "inline" || !e.clientWidth) continue;
    if (style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1)
      found.add(`wider than its box: ${named(e)}`);
    if (clips(style.overflowY) && e.clientHeight > 1 && e.scrollHeight > e.clientHeight + 1)
      found.add(`taller than its box: ${named(e)}`);
    if (box.right > innerWidth + 1 || box.left < -1) found.add(`beyond the window: ${named(e)}`);
  }

  // Words and colours, as the screen mixes them.
  const one = document.createElement("canvas");
  one.width = one.height = 1;
  const ink = one.getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    ink.clearRect(0, 0, 1, 1);
    ink.fillStyle = colour;
    ink.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = ink.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) =>
    [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const behind = (e) => {
    if (!e) return rgba("Canvas");
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(e.parentElement));
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = (e) => e ? getComputedStyle(e).opacity * faint(e.parentElement) : 1;
  const contrast = (e, colour) => {
    const paper = behind(e), text = rgba(colour);
    text[3] *= faint(e);
    const [low, high] = [light(paper), light(over(text, paper))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const readable = (e, colour) => {
    const ratio = contrast(e, colour);
    if (ratio < least) found.add(`contrast ${ratio.toFixed(2)}: ${named(e)}`);
  };
  for (const e of parts) {
    const words = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (words) readable(e, e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color);
  }

  // Labels of figures: words, or their outlines in groups of that name.
  for (const svg of parts.filter((e) => e.tagName === "svg")) {
    const frame = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll('text, g[id*="text_"]')].filter(shown);
    for (const group of labels.filter((e) => e.tagName === "g"))
      readable(group, getComputedStyle(group.querySelector("[style*=fill]") || group).fill);
    const boxes = labels.map((e) => [e, e.getBoundingClientRect()]);
    boxes.forEach(([e, a], place) => {
      const name = `label ${e.id || e.textContent} of ${svg.getAttribute("aria-label")}`;
      if (a.left < frame.left - 1 || a.right > frame.right + 1
          || a.top < frame.top - 1 || a.bottom > frame.bottom + 1) found.add(`cut off: ${name}`);
      for (const [other, b] of boxes.slice(place + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
          found.add(`overlaps ${other.id || other.textContent}: ${name}`);
    });
  }

  // What a picture, a link or a cell on its own line is.
  for (const e of parts) {
    const label = e.getAttribute("aria-label") || e.getAttribute("title");
    if (e.tagName === "IMG" && !e.hasAttribute("alt")) found.add(`no alt: ${e.src}`);
    if (e.getAttribute("role") === "img" && !label) found.add(`no label: ${named(e)}`);
    if (["A", "BUTTON"].includes(e.tagName) && e.offsetWidth && !label && !e.textContent.trim()
        && !e.querySelector("img[alt], [aria-label], title")) found.add(`no name: ${named(e)}`);
    if (e.tagName === "TD" && getComputedStyle(e).display === "flex" && !e.dataset.head)
      found.add(`a line without its head: ${named(e)}`);
  }
  return [...found];
})
"""


def faults_of(browser: Browser, *, within: str = "body", scrollers: str = "") -> list[str]:
    """Faults of the page that a browser shows, a line each; its folded parts are opened.

    Nothing wider than the window or its own box, no text under another or cut off, no words whose
    contrast is below ``LEAST_CONTRAST``, no picture without words for it, no cell without its head.

    Args:
        browser: It shows the page.
        within: Selector of the parts to look at.
        scrollers: Selector of boxes that a reader may scroll sideways; empty for none.
    """
    asked = {"within": within, "scrollers": scrollers, "least": LEAST_CONTRAST}
    found: list[str] = browser.run(f"({_LOOK.strip()})({json.dumps(asked)})")
    said, browser.said = [f"console: {text}" for text in browser.said], []
    return [*found, *said]
