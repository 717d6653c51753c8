"""Draws rectangles, lines and text into an SVG file; all sizes in pixels."""

import pathlib
from xml.sax.saxutils import escape

# Has an outline.
WHITE = "#ffffff"
_FONT = "font-family='Helvetica, Arial, sans-serif'"


class Drawing:
  """A picture that grows as things are drawn on it."""

  def __init__(self, title: str):
    """Starts an empty picture; `title` is what screen readers say."""
    self._title = title
    self._parts: list[str] = []
    self._width = self._height = 0.0

  def _reach(self, x: float, y: float) -> None:
    self._width = max(self._width, x)
    self._height = max(self._height, y)

  def rectangle(
    self,
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
  ) -> None:
    """Draws a filled rectangle from its upper left corner; `WHITE` is outlined."""
    outline = "#555" if color == WHITE else "none"
    self._reach(x + width, y + height)
    self._parts.append(
      f"<rect x='{x:.2f}' y='{y:.2f}' width='{width:.2f}'"
      f" height='{height:.2f}' fill='{color}' stroke='{outline}'/>"
    )

  def line(
    self, x0: float, y0: float, x1: float, y1: float, color: str = "#333"
  ) -> None:
    """Draws a line."""
    self._reach(max(x0, x1), max(y0, y1))
    self._parts.append(
      f"<line x1='{x0:.2f}' y1='{y0:.2f}' x2='{x1:.2f}' y2='{y1:.2f}'"
      f" stroke='{color}'/>"
    )

  def text(
    self,
    x: float,
    y: float,
    content: str,
    size: float = 12,
    anchor: str = "start",
    color: str = "#222",
    bold: bool = False,
  ) -> None:
    """Writes a line of text; `y` is its baseline, `anchor` as in SVG."""
    # An estimate: fonts differ.
    width = {"start": 1.0, "middle": 0.5, "end": 0.0}[anchor]
    self._reach(x + width * 0.55 * size * len(content), y + size / 2)
    weight = " font-weight='bold'" if bold else ""
    self._parts.append(
      f"<text x='{x:.2f}' y='{y:.2f}' font-size='{size}' fill='{color}'"
      f" text-anchor='{anchor}'{weight} {_FONT}>{escape(content)}</text>"
    )

  def legend(self, x: float, y: float, entries: dict[str, str]) -> None:
    """Draws colours by name, in a row."""
    for name, color in entries.items():
      self.rectangle(x, y - 9, 10, 10, color)
      self.text(x + 14, y, name, size=11)
      x += 32 + 6.2 * len(name)

  def to_text(self) -> str:
    """Returns the file's content."""
    width, height = self._width + 16, self._height + 16
    head = (
      "<svg xmlns='http://www.w3.org/2000/svg' role='img'"
      f" width='{width:.0f}' height='{height:.0f}'"
      f" viewBox='0 0 {width:.0f} {height:.0f}'>"
    )
    background = (
      f"<rect width='{width:.0f}' height='{height:.0f}' fill='#fff'/>"
    )
    title = f"<title>{escape(self._title)}</title>"
    parts = [head, title, background, *self._parts, "</svg>"]
    return "\n".join(parts) + "\n"

  def write(self, path: pathlib.Path) -> None:
    """Writes the file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(self.to_text(), encoding="utf-8")
