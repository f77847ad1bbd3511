// Charts: entropy and lead over a run, predictions of one position over its steps, and a heat map.

// Drawings have as many units as pixels, so that their text has one size on every screen.
const widthIn = (node, most = 760) => Math.max(Math.min(node.clientWidth, most), 240);

// Lines over steps on one axis in nats; `lines`: [{name, kind, points: [[step, value or null]]}].
function lineChart(lines, steps, title, width, height, pick) {
  const left = 34, right = 8, top = 8, bottom = 20;
  const values = lines.flatMap((line) => line.points.map((point) => point[1])).filter(Number.isFinite);
  const most = niceAbove(Math.max(...values, 0.1)), span = Math.max(steps[1] - steps[0], 1);
  const x = (step) => left + ((step - steps[0]) / span) * (width - left - right);
  const y = (value) => top + (1 - Math.min(value, most) / most) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width: width, height, role: "img", "aria-label": title, class: "pick" });
  for (const value of [0, most / 2, most]) {
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "axis" }),
      shape("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, String(+value.toFixed(2))));
  }
  for (const step of new Set([steps[0], Math.round((steps[0] + steps[1]) / 2), steps[1]])) {
    svg.append(shape("text", { x: x(step), y: height - 4, "text-anchor": step === steps[0] ? "start" : step === steps[1] ? "end" : "middle" }, pick.name(step)));
  }
  for (const { kind, points } of lines) {
    const real = points.filter((point) => Number.isFinite(point[1]));
    if (real.length > 1) svg.append(shape("polyline", { points: real.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" "), class: kind }));
    if (real.length < 60) for (const [step, value] of real) svg.append(shape("circle", { cx: x(step).toFixed(1), cy: y(value).toFixed(1), r: 2, class: `dot ${kind}` }));
  }
  const here = shape("line", { y1: top - 4, y2: height - bottom, class: "here", visibility: "hidden" });
  svg.append(here);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
    pick.go(Math.min(Math.max(Math.round(steps[0] + ((at - left) / (width - left - right)) * span), steps[0]), steps[1]));
  });
  const mark = (step) => {
    here.setAttribute("visibility", step >= steps[0] && step <= steps[1] ? "visible" : "hidden");
    here.setAttribute("x1", x(step));
    here.setAttribute("x2", x(step));
  };
  return { svg, mark };
}

function niceAbove(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].find((k) => k * unit >= value) * unit;
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

// Uncertainty and lead of what each step revealed in a row.
class RunChart {
  constructor(side) {
    this.side = side;
    this.node = element("figure", {});
  }

  build(row) {
    const { side } = this, { reveal, kind, logP, lead, end } = side.rows[row];
    const by = side.steps.index.map(() => ({ first: [], lead: [] }));
    this.name = side.lens ? "entropy of the prediction" : "−log p of the token";
    for (let position = 0; position < end; position++) {
      if (kind[position] !== WRITTEN) continue;
      const at = by[reveal[position]], depths = side.lens && predictionAt(side, row, position, reveal[position]).depths;
      const value = depths ? depths[depths.length - 1].entropy : logP[position] === null ? null : -number(logP[position]);
      if (value !== null) at.first.push(value);
      if (lead[position] !== null) at.lead.push(number(lead[position]));
    }
    this.first = by.map((at) => mean(at.first));
    this.lead = by.map((at) => mean(at.lead));
    const points = (values) => values.map((value, step) => [step, value === null ? NaN : value]);
    const pick = { go: (step) => page.show(step + 1), name: (step) => String(side.steps.index[step]) };
    const lines = [{ kind: "first", points: points(this.first) }, { kind: "second", points: points(this.lead) }];
    const title = `Chart over steps: ${this.name}, and lead of the drawn token, in nats`;
    this.chart = lineChart(lines, [0, Math.max(side.steps.index.length - 1, 0)], title, widthIn(this.node), 150, pick);
    this.caption = element("figcaption", {});
    this.node.replaceChildren(this.chart.svg, this.caption);
  }

  draw(step) {
    this.chart.mark(step);
    const value = (values) => (step < 0 ? "" : ` ${nats(values[step] === undefined ? null : values[step])}`);
    this.caption.replaceChildren(element("span", { class: "swatch" }), `${this.name}${value(this.first)}`, element("br"),
      element("span", { class: "swatch second" }), `lead over the runner-up${value(this.lead)} `,
      element("span", {}, "(nats, by step; means where a step reveals several)"));
  }
}

// Log-probability of the written token by depth and step; darkest at 0, lightest at -LEAST nats.
const LEAST = 10;

function heatMap(predictions, first, title, width, pick) {
  const depths = predictions[0].depths.length, n = predictions.length, left = 66, cell = 16;
  const height = depths * cell + 20, column = (width - left) / Math.max(n, 12);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width: width, height, role: "img", "aria-label": title, class: "pick" });
  for (let depth = 0; depth < depths; depth++) {
    const y = (depths - 1 - depth) * cell;
    svg.append(shape("text", { x: left - 6, y: y + 12, "text-anchor": "end" }, predictions[0].depths[depth].name));
    predictions.forEach((prediction, i) => {
      const x = 1 + prediction.depths[depth].logP / LEAST;
      const box = shape("rect", { x: (left + i * column).toFixed(2), y, width: column.toFixed(2), height: cell, fill: `rgb(${rampColor("lens", x).join(",")})` });
      box.append(shape("title", {}, `${prediction.depths[depth].name}, step ${pick.name(first + i)}: log p ${nats(prediction.depths[depth].logP)}`));
      svg.append(box);
    });
  }
  svg.append(shape("text", { x: left, y: height - 4 }, `step ${pick.name(first)}`));
  if (n > 1) svg.append(shape("text", { x: left + n * column, y: height - 4, "text-anchor": "end" }, n > 9 ? `step ${pick.name(first + n - 1)}` : pick.name(first + n - 1)));
  const chosen = shape("rect", { y: 0, width: Math.max(column, 2), height: depths * cell, class: "chosen" });
  svg.append(chosen);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
    pick.go(first + Math.min(Math.max(Math.floor((at - left) / column), 0), n - 1));
  });
  return { svg, mark: (step) => chosen.setAttribute("x", left + (step - first) * column) };
}
