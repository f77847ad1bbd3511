// The canvas of a run: its tokens after a step, and what is marked on them.

class Canvas {
  constructor(side, number, open) {
    Object.assign(this, { side, number, open, tokens: [], edges: [] });
    this.text = element("div", { class: data.spaced ? "text spaced" : "text", role: "group", "aria-label": `Text of the ${side.name}` });
    this.caption = element("p", { class: "quiet" });
    this.legend = element("div", { class: "legend" });
    this.chart = new RunChart(side);
    this.node = element("section", { class: "run", "aria-label": side.name },
      element("h2", {}, side.name), this.caption, this.text, this.legend, this.chart.node);
  }

  // Lay out a row of the batch.
  build(row, behind) {
    this.row = row;
    const { tokens, end } = this.side.rows[row], size = this.side.blockSize;
    this.text.replaceChildren();
    this.tokens = [];
    this.edges = [];
    const length = behind ? tokens.length : end;
    this.blocks = new Map(this.side.steps.window.map(([start], i) => [start, this.side.steps.block[i]]));
    for (let position = 0; position < length; position++) {
      if (position % size === 0) {
        const edge = element("span", { class: "edge", "aria-hidden": "true", title: this.blockName(position) });
        this.edges.push({ edge, position });
        this.text.append(edge);
      }
      const node = element("span", { role: "button", tabindex: 0, class: "token", "data-position": position, "aria-controls": "panel", onclick: () => this.open(this.number, position) });
      this.tokens.push(node);
      this.text.append(node);
    }
    this.chart.build(row);
  }

  // Blocks are counted as steps do: from the first one that the run denoises.
  blockName(position) {
    const number = this.blocks.get(position - (position % this.side.blockSize));
    return number === undefined ? "a block that was given" : `block ${number}`;
  }

  isMask(position, shown) {
    const row = this.side.rows[this.row];
    return row.kind[position] === LEFT || (row.kind[position] === WRITTEN && row.reveal[position] >= shown);
  }

  idAt(position, shown) {
    return this.isMask(position, shown) ? this.side.maskId : this.side.rows[this.row].tokens[position];
  }

  // Draw the canvas after `shown` steps.
  draw(state, other) {
    const { side } = this, row = side.rows[this.row], shown = Math.min(state.shown, side.steps.index.length);
    const step = shown - 1, window = side.steps.window[Math.max(step, 0)];
    const attention = this.attentionColors(state);
    this.drawn = { shown, now: [], behind: 0 };
    row.reveal.forEach((reveal, position) => {
      if (reveal !== step || step < 0 || row.kind[position] !== WRITTEN) return;
      if (position < row.end) this.drawn.now.push(position);
      else this.drawn.behind += 1;
    });
    this.tokens.forEach((node, position) => {
      const mask = this.isMask(position, shown), id = this.idAt(position, shown);
      const differs = other !== null && other.idAt(position, Math.min(state.shown, other.side.steps.index.length)) !== id;
      const first = data.firstDifference[this.row];
      const classes = ["token"];
      const flags = {
        mask, given: row.kind[position] === GIVEN && !mask, now: this.drawn.now.includes(position) || (row.reveal[position] === step && step >= 0),
        special: !mask && isSpecial(id), differs, parts: differs && first !== null && first.position === position,
        active: position >= window[0] && position < window[1], behind: position >= row.end,
        open: state.open !== null && state.open.side === this.number && state.open.position === position,
      };
      for (const [name, on] of Object.entries(flags)) if (on) classes.push(name);
      node.className = classes.join(" ");
      node.setAttribute("aria-label", this.label(position, id, flags));
      node.title = node.getAttribute("aria-label");
      node.setAttribute("aria-expanded", String(flags.open));
      this.write(node, position, id, mask, state);
      unpaint(node);
      this.color(node, position, mask, state, attention);
    });
    for (const { edge, position } of this.edges) {
      const active = position === Math.floor(window[0] / side.blockSize) * side.blockSize;
      edge.classList.toggle("active", active);
      edge.dataset.block = this.blocks.get(position) ?? "";
    }
    this.caption.textContent = this.describe(shown);
    if (this.number === 0) this.drawLegend(state);
    this.chart.draw(step);
  }

  write(node, position, id, mask, state) {
    const text = visible(wordOf(id)), lines = text.split("\n");
    node.replaceChildren();
    if (!mask) {
      lines.forEach((line, i) => {
        if (i > 0) node.append(element("span", { class: "break" }, "↵"), "\n");
        node.append(line);
      });
    }
    if (state.numbers && !mask && this.side.rows[this.row].kind[position] === WRITTEN) {
      node.insertBefore(element("small", {}, this.numberOf(position, state)), node.querySelector(".break"));
    }
  }

  numberOf(position, state) {
    const { reveal, logP } = this.side.rows[this.row];
    return state.color === "confidence" ? percent(Math.exp(number(logP[position]))) : String(this.side.steps.index[reveal[position]]);
  }

  color(node, position, mask, state, attention) {
    const row = this.side.rows[this.row];
    if (attention) {
      const units = attention.shares[position - attention.firstKey];
      if (units !== undefined && units > 0) paint(node, "attention", Math.sqrt(units / 1000));
    } else if (!mask && row.kind[position] === WRITTEN) {
      if (state.color === "order") paint(node, "order", row.reveal[position] / Math.max(this.lastReveal(), 1));
      if (state.color === "confidence" && row.logP[position] !== null) paint(node, "confidence", 1 + number(row.logP[position]) / LEAST);
    }
  }

  lastReveal() {
    const { reveal, end } = this.side.rows[this.row];
    return Math.max(...reveal.slice(0, end), 0);
  }

  attentionColors(state) {
    if (state.color !== "attention" || state.open === null || state.open.side !== this.number) return null;
    const step = stepFor(this.side, this.side.attention, this.row, state);
    return step === null ? null : attentionAt(this.side, this.row, state.open.position, step, state.layer, state.head);
  }

  label(position, id, flags) {
    const row = this.side.rows[this.row], parts = [];
    parts.push(flags.mask ? "mask" : inLine(id), `position ${position}`);
    if (flags.given) parts.push("given");
    if (!flags.mask && row.kind[position] === BEFORE) parts.push("written before this run");
    if (!flags.mask && row.kind[position] === WRITTEN) {
      parts.push(`revealed at step ${this.side.steps.index[row.reveal[position]]}`);
      if (row.logP[position] !== null) parts.push(`probability ${percent(Math.exp(number(row.logP[position])))}`);
    }
    if (flags.now) parts.push("at this step");
    if (flags.behind) parts.push("behind the end of the text");
    if (flags.differs) parts.push(flags.parts ? "first position that differs from the other run" : "differs from the other run");
    return parts.join(", ");
  }

  describe(shown) {
    const row = this.side.rows[this.row], inside = row.kind.slice(0, row.end);
    const written = inside.filter((kind) => kind === WRITTEN).length;
    const done = inside.filter((kind, i) => kind === WRITTEN && row.reveal[i] < shown).length;
    const given = inside.filter((kind) => kind === GIVEN).length;
    const behind = row.kind.slice(row.end).filter((kind) => kind === WRITTEN).length;
    return `${done} of ${written} tokens written, ${given} given` + (behind ? `; ${behind} more were revealed behind the end, to complete the last block` : "") + ". Click a token to open it.";
  }

  drawLegend(state) {
    const ramps = {
      order: ["revealed first", "last"], confidence: [`log p when drawn: ${MINUS}${LEAST} nats or less`, "0"], attention: ["attention: 0% (square-root scale)", "100%"],
    };
    const node = this.legend;
    node.replaceChildren(element("span", { class: "token given" }, "given"), element("span", {}, element("span", { class: "token mask" }), " mask"),
      element("span", { class: "token now" }, "revealed at this step"));
    if (data.sides.length > 1) node.append(element("span", { class: "token differs" }, "differs"), element("span", {}, "◆ where they part"));
    if (ramps[state.color]) node.append(ramp(state.color, ...ramps[state.color]));
  }
}
