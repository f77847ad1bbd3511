// The run as data: the JSON block of the page, its compressed arrays, and what each entry is.

const data = JSON.parse(document.getElementById("data").textContent);
const GIVEN = 0, WRITTEN = 1, BEFORE = 2, LEFT = 3;
const INFINITE = 65535;

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  return packed.bytes === 2 ? new Uint16Array(buffer) : new Uint32Array(buffer);
}

// The integers of each side, unpacked in place, and where the entries of a position begin.
async function unpackSide(side) {
  if (side.lens) {
    const names = ["tokens", "p", "written", "logP", "entropy", "margin"];
    const arrays = await Promise.all(names.map((name) => unpack(side.lens[name])));
    names.forEach((name, i) => { side.lens[name] = arrays[i]; });
    side.lens.entries = side.lens.margin.length;
    side.lens.start = starts(side, side.lens, () => 1);
  }
  if (side.attention) {
    side.attention.share = await unpack(side.attention.share);
    side.attention.start = starts(side, side.attention, (step) => keyCount(side, step));
  }
}

function keyCount(side, step) {
  return side.steps.window[step][1] - side.steps.firstKey[step];
}

function stepsOf(side, kept, row, position) {
  const first = kept.first[row][position];
  if (first < 0) return null;
  const reveal = side.rows[row].reveal[position];
  return { first: kept.every ? first : reveal, last: reveal };
}

function starts(side, kept, size) {
  let sum = 0;
  return kept.first.map((positions, row) => positions.map((_, position) => {
    const begin = sum, steps = stepsOf(side, kept, row, position);
    if (steps) for (let i = steps.first; i <= steps.last; i++) sum += size(i);
    return begin;
  }));
}

// What a step predicted for a position: of each depth the top tokens, log p and entropy; in nats.
function predictionAt(side, row, position, step) {
  const lens = side.lens, steps = lens && stepsOf(side, lens, row, position);
  if (!steps || step < steps.first || step > steps.last) return null;
  const slot = lens.start[row][position] + step - steps.first, n = lens.entries;
  const depths = lens.depths.map((name, depth) => ({
    name,
    top: Array.from({ length: lens.top }, (_, k) => {
      const at = (depth * lens.top + k) * n + slot;
      return { id: lens.tokens[at], share: lens.p[at] };
    }),
    written: lens.written[depth * n + slot],
    logP: lens.logP[depth * n + slot] === INFINITE ? -Infinity : -lens.logP[depth * n + slot] / 100,
    entropy: lens.entropy[depth * n + slot] / 100,
  }));
  const margin = lens.margin[slot];
  return { depths, margin: margin === INFINITE ? Infinity : margin / 100 };
}

// Attention from a position at a step, by key, in tenths of a percent.
function attentionAt(side, row, position, step, layer, head) {
  const kept = side.attention, steps = kept && stepsOf(side, kept, row, position);
  if (!steps || step < steps.first || step > steps.last) return null;
  let keys = kept.start[row][position];
  for (let i = steps.first; i < step; i++) keys += keyCount(side, i);
  const count = keyCount(side, step);
  const begin = keys * kept.layers * kept.heads + (layer * kept.heads + head) * count;
  return { firstKey: side.steps.firstKey[step], shares: kept.share.subarray(begin, begin + count) };
}

const number = (x) => (x === "inf" ? Infinity : x === "-inf" ? -Infinity : x);
