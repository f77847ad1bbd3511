// Small helpers of the page: elements, words, figures and colors.

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function shape(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

// Characters that show nothing, or that turn text around, are written out.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const code = (c) => "⟨" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
const visible = (text) => text.replace(HIDDEN, code).replace(/\t/g, "⇥") || "∅";
const wordOf = (id) => (data.words[id] ? data.words[id][0] : String(id));
const isSpecial = (id) => Boolean(data.words[id] && data.words[id][1]);
// In one line, with its spaces: for tables, labels and the status.
const inLine = (id) => visible(wordOf(id)).replace(/\n/g, "↵").replace(/^ +| +$/g, (s) => "␣".repeat(s.length));

const MINUS = "−";
const fixed = (x, digits) => (x < 0 ? MINUS : "") + Math.abs(x).toFixed(digits);
function nats(x, digits = 2) {
  if (x === null || Number.isNaN(x)) return "–";
  return Number.isFinite(x) ? fixed(x, digits) : x > 0 ? "∞" : MINUS + "∞";
}
// Tenths of a percent, as they are stored: 0 and 1000 are bounds, not values.
const share = (units) => (units === 0 ? "< 0.1%" : units >= 1000 ? "> 99.9%" : (units / 10).toFixed(1) + "%");
const percent = (p) => share(Math.round(p * 1000));

const RAMPS = {
  light: { order: ["#dcebfa", "#0a4a94"], confidence: ["#9c3a00", "#fdebd9"], attention: ["#ffffff", "#6a1b9a"], lens: ["#f6f7f9", "#1f6fbf"] },
  dark: { order: ["#22384f", "#a8d2ff"], confidence: ["#ffb066", "#3a2a1c"], attention: ["#14171c", "#dd9cff"], lens: ["#1d2128", "#7ab8ff"] },
};
const theme = () => document.documentElement.dataset.theme;
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function luminance(color) {
  const [r, g, b] = color.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function rampColor(name, x) {
  const [low, high] = RAMPS[theme()][name].map(rgb), at = Math.min(Math.max(x, 0), 1);
  return low.map((c, i) => Math.round(c + (high[i] - c) * at));
}
// Black or white text, whichever has more contrast: at least 4.5 on any color.
function paint(node, name, x) {
  const color = rampColor(name, x), light = luminance(color);
  node.style.backgroundColor = `rgb(${color.join(",")})`;
  node.style.color = (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff";
}
function unpaint(node) {
  node.style.backgroundColor = "";
  node.style.color = "";
}
function ramp(name, from, to) {
  const node = element("span", { class: "ramp" }, element("span", {}, from));
  for (let i = 0; i < 6; i++) {
    const cell = element("i");
    paint(cell, name, i / 5);
    node.append(cell);
  }
  node.append(element("span", {}, to));
  return node;
}
