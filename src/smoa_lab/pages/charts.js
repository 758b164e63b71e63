// Draws the charts of a page. It is bundled with Vega into the charts.js that lies beside the pages.

const PANEL = 205; // pixels that a panel takes with its axis
const LEAST = 510; // a chart is scrolled in a window that is narrower than so many pixels
const MOST = 1.35; // and drawn at most so many times its size in a wide one

for (const figure of document.querySelectorAll("figure[data-chart]")) draw(figure);

async function draw(figure) {
  const place = figure.querySelector(".chart");
  const chart = JSON.parse(figure.querySelector("script").textContent);
  if (chart.columns) chart.columns = Math.max(1, Math.min(chart.columns, Math.floor(place.clientWidth / PANEL)));
  const actions = { export: { svg: true, png: false }, source: false, compiled: false, editor: false };
  await vegaEmbed(place, chart, { renderer: "svg", actions });
  const drawn = place.querySelector(".marks"), width = drawn.viewBox.baseVal.width;
  drawn.style.minWidth = `${Math.min(width, chart.columns ? 0 : LEAST)}px`;
  drawn.style.maxWidth = `${MOST * width}px`;
  for (const mark of drawn.querySelectorAll("*")) if (mark.__data__?.href) makeLink(mark, mark.__data__.href);
  place.dataset.drawn = "";
}

// A mark that links somewhere is reached by the keyboard too, and then shows its values.
function makeLink(mark, href) {
  mark.setAttribute("tabindex", "0");
  mark.setAttribute("role", "link");
  mark.addEventListener("keydown", event => { if (event.key === "Enter") location.href = href; });
  const tell = (kind) => () => {
    const box = mark.getBoundingClientRect();
    const [clientX, clientY] = [box.x + box.width / 2, box.y + box.height / 2];
    mark.dispatchEvent(new PointerEvent(kind, { bubbles: true, clientX, clientY }));
  };
  mark.addEventListener("focus", tell("pointermove"));
  mark.addEventListener("blur", tell("pointerout"));
}
