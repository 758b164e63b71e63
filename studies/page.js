// Draws each figure's chart, which is beside it as Vega-Lite.
for (const figure of document.querySelectorAll('figure[data-chart]')) {
  const place = figure.querySelector('.chart'), chart = JSON.parse(figure.querySelector('script').textContent);
  vegaEmbed(place, chart, { renderer: 'svg', actions: false }).then(() => { place.dataset.drawn = ''; });
}

// Sorts a table by data-value where a cell has one, else by its text; numbers as numbers.
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.closest('th'), table = head.closest('table'), column = head.cellIndex;
  const up = head.getAttribute('aria-sort') !== 'ascending';
  const key = row => { const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent.trim();
    return value !== '' && !isNaN(value) ? Number(value) : value; };
  const order = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b));
  const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)) * (up ? 1 : -1));
  for (const other of table.querySelectorAll('th')) other.setAttribute('aria-sort', 'none');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  table.tBodies[0].append(...rows);
});
