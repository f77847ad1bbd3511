// The page's state, its controls and keys.

const page = {
  state: { row: 0, shown: 0, color: "order", numbers: false, behind: false, open: null, layer: 0, head: 0 },
  canvases: [],
  timer: null,

  set(changes) {
    const rebuilt = "row" in changes || "behind" in changes;
    if ("row" in changes && changes.row !== this.state.row) this.state.open = null;
    Object.assign(this.state, changes);
    if (rebuilt) this.canvases.forEach((canvas) => canvas.build(this.state.row, this.state.behind));
    this.draw();
  },

  show(shown) {
    this.set({ shown: Math.min(Math.max(shown, 0), this.steps) });
  },

  openToken(side, position) {
    const { open } = this.state;
    if (open !== null && open.side === side && open.position === position) this.close();
    else {
      this.set({ open: { side, position } });
      this.canvases[side].tokens[position].scrollIntoView({ block: "nearest" });
    }
  },

  close() {
    const { open } = this.state;
    this.set({ open: null, ...(this.state.color === "attention" ? { color: "order" } : {}) });
    if (open !== null) this.canvases[open.side].tokens[open.position]?.focus({ preventScroll: true });
  },

  play() {
    if (this.timer !== null) return this.pause();
    if (this.state.shown >= this.steps) this.show(0);
    byId("status").setAttribute("aria-live", "off");
    this.timer = setInterval(() => {
      this.show(this.state.shown + 1);
      if (this.state.shown >= this.steps) this.pause();
    }, Math.max(60, Math.min(300, 20000 / this.steps)));
    this.drawPlay();
  },

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    byId("status").setAttribute("aria-live", "polite");
    this.drawPlay();
  },

  drawPlay() {
    byId("play").textContent = this.timer === null ? "▶" : "❚❚";
    byId("play").setAttribute("aria-label", this.timer === null ? "Play" : "Pause");
  },

  draw() {
    const { state, canvases } = this;
    byId("layout").classList.toggle("open", state.open !== null);
    document.body.classList.toggle("sheet", state.open !== null);
    canvases.forEach((canvas, i) => canvas.draw(state, canvases.length > 1 ? canvases[1 - i] : null));
    const status = this.describe();
    byId("step").value = state.shown;
    byId("step").setAttribute("aria-valuetext", status);
    byId("count").textContent = `${state.shown} / ${this.steps}`;
    byId("status").textContent = status;
    byId("color").value = state.color;
    byId("parting").hidden = data.firstDifference[state.row] === null;
    this.panel.draw(state, canvases);
  },

  describe() {
    const { state, canvases } = this;
    if (state.shown === 0) return "Before the first step.";
    const lines = canvases.map(({ side, drawn, row }) => {
      const step = drawn.shown - 1, { steps } = side, t = number(steps.t[step][row]);
      const begin = canvases.length > 1 ? `${side.name}: ` : "";
      if (state.shown > steps.index.length) return `${begin}finished after step ${steps.index[step]}.`;
      const words = drawn.now.map((position) => `${inLine(side.rows[row].tokens[position])} at position ${position}`);
      if (drawn.behind) words.push(`${drawn.behind} behind the end of the text`);
      const what = words.length > 4 ? [...words.slice(0, 3), `${words.length - 3} more`] : words;
      return `${begin}step ${steps.index[step]}, block ${steps.block[step]}, t = ${t.toFixed(3)}; revealed ${what.length ? what.join(", ") : "nothing in this row"}.`;
    });
    const first = data.firstDifference[state.row];
    if (data.sides.length > 1) {
      lines.push(first === null ? "The two runs do not differ in this row."
        : `They first differ at position ${first.position}, after step ${data.sides[0].steps.index[first.step] ?? first.step}.`);
    }
    return lines.join("\n");
  },

  key(event) {
    const at = event.target, field = at.matches("select, input[type=checkbox]");
    if (event.ctrlKey || event.metaKey || event.altKey || field) return;
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
    const vertical = event.key === "ArrowUp" || event.key === "ArrowDown";
    if (event.key in steps && (!vertical || at.id === "step")) this.show(this.state.shown + steps[event.key]);
    else if (event.key === "Home") this.show(0);
    else if (event.key === "End") this.show(this.steps);
    else if (event.key === "Enter" && at.matches(".token")) at.click();
    else if (event.key === " " && !at.matches("button, summary")) this.play();
    else if (event.key === "Escape") this.close();
    else return;
    event.preventDefault();
  },
};

const byId = (id) => document.getElementById(id);

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
}

function drawFacts() {
  const node = byId("facts");
  for (const side of data.sides) {
    const list = element("dl");
    for (const [name, value] of side.facts) list.append(element("dt", {}, name), element("dd", {}, value));
    if (side.hooks.length) list.append(element("dt", {}, "hooks"), element("dd", {}, side.hooks.join(", ")));
    const kept = (part) => (part === null ? "not in this page" : part.every ? "at every step at which a position was masked" : "at the step that revealed a position");
    list.append(element("dt", {}, "predictions"), element("dd", {}, kept(side.lens)), element("dt", {}, "attention"), element("dd", {}, kept(side.attention)));
    for (const why of side.left) list.append(element("dt", {}, "left out"), element("dd", {}, why));
    node.append(element("h2", {}, side.name), list);
  }
  node.append(element("p", {}, "Tokens, log p, lead and reveal steps are the run's own. Predictions and attention were computed again from the finished run. "
    + "Predictions of a layer are its residual stream read out by the last norm and the unembedding (logit lens); the last layer's are the model's own. "
    + "Probabilities and attention are stored in tenths of a percent, entropy, margin and log p by layer in hundredths of a nat, and shown as they are stored."));
  if (!data.hasWords) node.append(element("p", {}, "The model has no tokenizer: tokens are shown as ids."));
}

async function start() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches);
  let switched = false;
  dark.addEventListener("change", () => { if (!switched) { setTheme(dark.matches); page.set({ row: page.state.row }); } });
  byId("theme").addEventListener("click", () => { switched = true; setTheme(theme() !== "dark"); page.draw(); });
  await Promise.all(data.sides.map(unpackSide));
  page.steps = Math.max(...data.sides.map((side) => side.steps.index.length));
  page.panel = new Panel(byId("panel"));
  page.canvases = data.sides.map((side, i) => new Canvas(side, i, (number, position) => page.openToken(number, position)));
  byId("runs").append(...page.canvases.map((canvas) => canvas.node));
  byId("step").max = page.steps;
  data.sides[0].rows.forEach((_, row) => byId("row").append(element("option", { value: row }, String(row))));
  byId("row-choice").hidden = data.sides[0].rows.length < 2;
  byId("behind-choice").hidden = !data.sides.some((side) => side.rows.some((row) => row.kind.slice(row.end).includes(WRITTEN)));
  byId("color").querySelector('[value="attention"]').disabled = !data.sides.some((side) => side.attention);
  byId("row").addEventListener("change", (event) => page.set({ row: Number(event.target.value) }));
  byId("color").addEventListener("change", (event) => page.set({ color: event.target.value }));
  byId("numbers").addEventListener("change", (event) => page.set({ numbers: event.target.checked }));
  byId("behind").addEventListener("change", (event) => page.set({ behind: event.target.checked, open: null }));
  byId("step").addEventListener("input", (event) => page.show(Number(event.target.value)));
  byId("play").addEventListener("click", () => page.play());
  byId("back").addEventListener("click", () => page.show(page.state.shown - 1));
  byId("forth").addEventListener("click", () => page.show(page.state.shown + 1));
  document.addEventListener("keydown", (event) => page.key(event));
  byId("first").addEventListener("click", () => page.show(data.firstDifference[page.state.row].step + 1));
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; page.set({ row: page.state.row }); } });
  drawFacts();
  page.set({ row: 0, shown: page.steps });
  document.documentElement.dataset.ready = "true";
  performance.mark("ready");
}

start().catch((error) => { byId("status").textContent = `This browser cannot open the page: ${error.message}`; });
