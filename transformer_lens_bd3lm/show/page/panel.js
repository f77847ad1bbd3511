// The panel of the open token: how it was drawn, predictions by layer and step, and attention.

// The step whose values are shown for the open token: the page's, within those that are kept.
function stepFor(side, kept, row, state) {
  const steps = kept && stepsOf(side, kept, row, state.open.position);
  return steps ? Math.min(Math.max(state.shown - 1, steps.first), steps.last) : null;
}

class Panel {
  constructor(node) {
    this.node = node;
  }

  draw(state, canvases) {
    const focused = this.node.contains(document.activeElement) ? document.activeElement.id : null;
    const scroll = this.node.scrollTop;
    this.node.replaceChildren();
    if (state.open === null) return;
    const canvas = canvases[state.open.side], side = canvas.side;
    const row = side.rows[state.row], position = state.open.position;
    const id = row.tokens[position];
    this.node.append(
      element("div", { class: "head" },
        element("h2", { class: "name" }, row.kind[position] === LEFT ? "mask" : inLine(id)),
        element("button", { type: "button", id: "close", "aria-label": "Close", onclick: () => page.close() }, "✕")),
      this.drawnHow(side, row, position, id, state, canvases));
    if (row.kind[position] === WRITTEN && position < row.end) {
      this.lens(side, state, row, id);
      this.attention(side, state, canvas);
    }
    this.node.scrollTop = scroll;
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  drawnHow(side, row, position, id, state, canvases) {
    const list = element("dl"), add = (name, ...value) => list.append(element("dt", {}, name), element("dd", {}, ...value));
    const own = canvases[state.open.side];
    add("position", `${position}, ${own.blockName(position)}, id ${id}`);
    const kinds = ["given in the prompt", "", "written before this run began", "never revealed"];
    if (row.kind[position] !== WRITTEN) add("token", kinds[row.kind[position]]);
    else {
      const reveal = row.reveal[position], logP = row.logP[position], lead = row.lead[position];
      add("revealed", `at step ${side.steps.index[reveal]} `, this.goTo(reveal));
      if (logP !== null) add("probability", `${percent(Math.exp(number(logP)))}, log p = ${nats(number(logP), 4)} nats`);
      add("lead", lead === null ? "none: it was given to the run, not drawn" : `${nats(number(lead), 4)} nats over the runner-up's score, which is log p plus the noise of the draw`);
      if (position >= row.end) add("note", "behind the end: it completes the block, and predictions are not kept");
    }
    canvases.filter((canvas) => canvas.side !== side).forEach(({ side: its }) => {
      const other = its.rows[state.row], token = other.tokens[position], written = other.kind[position] === WRITTEN;
      const same = token === id && other.reveal[position] === row.reveal[position];
      const how = written ? `, step ${its.steps.index[other.reveal[position]]}, ${percent(Math.exp(number(other.logP[position])))}` : "";
      add(`in the ${its.name}`, same ? `the same${how}` : `${inLine(token)}${how}`);
    });
    return list;
  }

  goTo(step, text = "go there") {
    return element("button", { type: "button", id: "go", onclick: () => page.show(step + 1) }, text);
  }

  lens(side, state, row, id) {
    const { position } = state.open, step = stepFor(side, side.lens, state.row, state);
    if (step === null) {
      this.node.append(element("p", { class: "quiet" }, "No predictions are in this page; run.to_html(path) keeps them."));
      return;
    }
    const { first, last } = stepsOf(side, side.lens, state.row, position), name = (i) => String(side.steps.index[i]);
    const now = predictionAt(side, state.row, position, step), deep = now.depths[now.depths.length - 1];
    const pick = { go: (i) => page.show(i + 1), name };
    this.node.append(element("h3", {}, `Predictions before the draw of step ${name(step)}`),
      element("p", { class: "quiet" }, first === last
        ? side.lens.every ? "It was masked at this step alone." : "Kept at the step that revealed it."
        : `It was masked from step ${name(first)} to ${name(last)}; the slider chooses one of these.`),
      element("p", { id: "now" }, `entropy ${nats(deep.entropy)} nats, margin of the top prediction ${nats(now.margin)} nats, `
        + `written token ${share(deep.written)} (log p ${nats(deep.logP)})`));
    this.table(now, id);
    if (first === last) return;
    const all = Array.from({ length: last - first + 1 }, (_, i) => predictionAt(side, state.row, position, first + i));
    if (side.lens.depths.length > 1) {
      const map = heatMap(all, first, "Log-probability of the written token by layer and step", widthIn(this.node) - 34, pick);
      map.mark(step);
      this.node.append(element("h3", {}, "log p of the written token by layer and step"), map.svg, element("div", { class: "legend" }, ramp("lens", `log p: ${MINUS}${LEAST} nats or less`, "0")));
    }
    const line = (kind, value) => ({ kind, points: all.map((at, i) => [first + i, value(at)]) });
    const chart = lineChart([line("first", (at) => at.depths[at.depths.length - 1].entropy), line("second", (at) => at.margin)],
      [first, last], "Entropy and margin of this position over steps, in nats", widthIn(this.node) - 34, 130, pick);
    chart.mark(step);
    this.node.append(element("h3", {}, "Entropy and margin over steps"), element("figure", {}, chart.svg, element("figcaption", {},
      element("span", { class: "swatch" }), "entropy ", element("span", { class: "swatch second" }), "log p of the top token less the second's (nats)")));
  }

  table(prediction, id) {
    const head = element("tr", {}, element("th", { scope: "col" }, "after"));
    prediction.depths[0].top.forEach((_, k) => head.append(element("th", { scope: "col" }, `top ${k + 1}`)));
    head.append(element("th", { scope: "col" }, "p(written)"), element("th", { scope: "col" }, "entropy"));
    const body = element("tbody");
    for (const depth of [...prediction.depths].reverse()) {
      const line = element("tr", {}, element("th", { scope: "row" }, depth.name));
      for (const { id: token, share: units } of depth.top) {
        const own = token === id;
        const cell = element("td", { class: own ? "own" : "", title: `${inLine(token)}: ${share(units)}${own ? ", the written token" : ""}` },
          element("span", { class: "word" }, inLine(token)), share(units));
        paint(cell, "lens", units / 1000);
        line.append(cell);
      }
      line.append(element("td", { class: "figure" }, share(depth.written)), element("td", { class: "figure" }, nats(depth.entropy)));
      body.append(line);
    }
    this.node.append(element("p", { class: "quiet" }, "Likeliest tokens by layer; the written token is framed. Entropy in nats."));
    this.node.append(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Predictions by layer" },
      element("table", { id: "lens" }, element("thead", {}, head), body)));
  }

  attention(side, state, canvas) {
    this.node.append(element("h3", {}, "Attention from this position"));
    const step = stepFor(side, side.attention, state.row, state);
    if (step === null) {
      this.node.append(element("p", { class: "quiet" }, "No attention is in this page; run.to_html(path) keeps it where it fits."));
      return;
    }
    const choice = (name, count, value) => {
      const select = element("select", { id: name, onchange: () => page.set({ [name]: Number(select.value), color: "attention" }) });
      for (let i = 0; i < count; i++) select.append(element("option", { value: i, ...(i === value ? { selected: "" } : {}) }, String(i)));
      return element("label", {}, `${name} `, select);
    };
    const box = element("input", { type: "checkbox", id: "colors", onchange: () => page.set({ color: box.checked ? "attention" : "order" }) });
    box.checked = state.color === "attention";
    this.node.append(element("div", { class: "stepper" }, choice("layer", side.attention.layers, state.layer),
      choice("head", side.attention.heads, state.head), element("label", {}, box, " color the text")));
    const { firstKey, shares } = attentionAt(side, state.row, state.open.position, step, state.layer, state.head);
    const best = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, 6).filter((i) => shares[i] > 0);
    const list = element("ol", { class: "keys-list", "aria-label": "Keys with the most attention" });
    for (const i of best) {
      const position = firstKey + i, end = side.rows[state.row].end;
      const key = position === state.open.position ? "itself" : canvas.isMask(position, step) ? "mask" : inLine(canvas.idAt(position, step));
      list.append(element("li", {}, element("span", { class: "quiet" }, `pos ${position}`),
        element("span", { class: "word" }, position >= end ? `${key} (behind the end)` : key), element("span", { class: "share" }, share(shares[i]))));
    }
    const kept = side.attention.every ? "" : " Attention is kept at the step that revealed the token.";
    this.node.append(element("p", { class: "quiet" }, `At step ${side.steps.index[step]}, over ${shares.length} keys.${kept}`), list);
  }
}
