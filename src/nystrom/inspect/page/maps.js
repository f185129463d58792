// Attention matrices on two canvases with one scale, read by pointer, finger or arrow keys.

const RAMPS = {
  light: {
    more: ["#ffffff", "#cfe3f1", "#56b4e9", "#0072b2", "#00253d"],
    less: ["#ffffff", "#f7d9bf", "#e8955a", "#d55e00", "#5c2800"],
  },
  dark: {
    more: ["#101418", "#0b3a59", "#0072b2", "#56b4e9", "#eaf6ff"],
    less: ["#101418", "#5a2a05", "#c25400", "#f0a05a", "#fff0e2"],
  },
};
const night = matchMedia("(prefers-color-scheme: dark)");

/** Two-byte floats in base64, as numbers. */
function decode(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)),
    view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
    const half = view.getUint16(2 * i, true),
      power = (half >> 10) & 31,
      rest = half & 1023;
    const size = power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -24 * rest;
    return half >> 15 ? -size : size;
  });
}

/** A colour of a ramp at 0 to 1, as red, green, blue. */
function colourAt(ramp, t) {
  const place = Math.min(Math.max(t, 0), 1) * (ramp.length - 1),
    i = Math.min(Math.floor(place), ramp.length - 2);
  const channel = (hex, c) => parseInt(hex.slice(1 + 2 * c, 3 + 2 * c), 16);
  return [0, 1, 2].map((c) => channel(ramp[i], c) + (place - i) * (channel(ramp[i + 1], c) - channel(ramp[i], c)));
}

/** Weight to 0..1 by its logarithm: a tenth of what an even spread gives is blank, the exact map's largest is full. */
function scaleOf(exact, even) {
  const low = even / 10,
    high = Math.max(...exact, even * 2);
  return {
    low,
    high,
    place: (weight) => (Math.abs(weight) <= low ? 0 : Math.log(Math.abs(weight) / low) / Math.log(high / low)),
  };
}

function paint(canvas, values, side, scale) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d"),
    image = context.createImageData(side, side),
    ramps = RAMPS[night.matches ? "dark" : "light"];
  values.forEach((weight, i) => {
    image.data.set([...colourAt(weight < 0 ? ramps.less : ramps.more, scale.place(weight)), 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

/** What a group of tokens is called: its place and its text. */
function tokensOf(report, group, place) {
  const from = place * group,
    to = Math.min(from + group, report.tokens.length) - 1;
  const text = report.tokens
    .slice(from, to + 1)
    .map((token) => token.trim())
    .join(" ");
  return { place: from === to ? `${from}` : `${from}–${to}`, text };
}

/** A figure with a canvas, its axes, and a cross that follows what is read. */
function sheet(figure, title, words) {
  const frame = element("div", "", "map"),
    rows = element("div", "", "rows"),
    columns = element("div", "", "columns");
  const paper = element("div", "", "sheet"),
    canvas = element("canvas"),
    cross = [element("div", "", "cross"), element("div", "", "cross"), element("div", "", "spot")];
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}: ${words}. Arrow keys read the weights.`);
  rows.append(element("span", "0"), element("span", "query token", "name"), element("span", "", "last"));
  columns.append(element("span", "0"), element("span", "key token", "name"), element("span", "", "last"));
  paper.append(canvas, ...cross);
  frame.append(rows, paper, columns);
  figure.replaceChildren(element("figcaption", title), frame);
  return { canvas, cross, last: [rows.lastChild, columns.lastChild], caption: figure.firstChild };
}

/** Draw a head, and let it be read. Returns what redraws it with another approximation. */
function mapViewer(report, read) {
  const left = sheet(document.getElementById("map-exact"), "Exact", "the exact attention matrix");
  const right = sheet(
    document.getElementById("map-approximate"),
    "Approximate",
    "the matrix of the chosen approximation",
  );
  let head = null,
    values = null,
    at = null;

  function point(row, column) {
    at = [row, column];
    const size = 100 / head.side;
    for (const { cross } of [left, right]) {
      const [across, down, spot] = cross;
      Object.assign(across.style, { left: 0, width: "100%", top: `${row * size}%`, height: `${size}%` });
      Object.assign(down.style, { top: 0, height: "100%", left: `${column * size}%`, width: `${size}%` });
      Object.assign(spot.style, {
        top: `${row * size}%`,
        height: `${size}%`,
        left: `${column * size}%`,
        width: `${size}%`,
      });
    }
    const place = row * head.side + column;
    read(
      tokensOf(report, head.group, row),
      tokensOf(report, head.group, column),
      values.exact[place],
      values.approximate[place],
    );
  }

  function draw() {
    const scale = scaleOf(values.exact, head.group / report.texts.length);
    paint(left.canvas, values.exact, head.side, scale);
    paint(right.canvas, values.approximate, head.side, scale);
    drawScale(scale, head.group / report.texts.length, values);
  }

  for (const { canvas } of [left, right]) {
    const follow = (event) => {
      const box = canvas.getBoundingClientRect(),
        inside = (x) => Math.min(Math.max(Math.floor(x * head.side), 0), head.side - 1);
      point(inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width));
    };
    canvas.addEventListener("pointermove", follow);
    canvas.addEventListener("pointerdown", follow);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const bound = (x) => Math.min(Math.max(x, 0), head.side - 1);
      point(bound(at[0] + step[0]), bound(at[1] + step[1]));
    });
  }
  night.addEventListener("change", () => head && draw());

  return function show(chosen, choice) {
    head = chosen;
    values = { exact: decode(head.exact), approximate: decode(head.approximate[choice]) };
    right.caption.textContent = report.settings[choice].label;
    for (const { last } of [left, right]) for (const each of last) each.textContent = report.tokens.length - 1;
    draw();
    const [row, column] = at ?? [Math.floor(head.side / 2), Math.floor(head.side / 2)];
    point(Math.min(row, head.side - 1), Math.min(column, head.side - 1));
  };
}

/** The key to the colours. */
function drawScale(scale, even, values) {
  const host = document.getElementById("scale"),
    bar = element("canvas"),
    ticks = element("div", "", "ticks");
  const negative = values.approximate.some((weight) => weight < -scale.low);
  const ramps = RAMPS[night.matches ? "dark" : "light"],
    width = 256;
  bar.width = width;
  bar.height = negative ? 2 : 1;
  const context = bar.getContext("2d"),
    image = context.createImageData(width, bar.height);
  for (let row = 0; row < bar.height; row++)
    for (let i = 0; i < width; i++)
      image.data.set([...colourAt(row ? ramps.less : ramps.more, i / (width - 1)), 255], 4 * (row * width + i));
  context.putImageData(image, 0, 0);
  for (const [weight, name] of [
    [scale.low, ""],
    [even, " (even)"],
    [scale.high, ""],
  ]) {
    const tick = element("span", `${digits(weight)}${name}`);
    tick.style.left = `${100 * (weight === scale.low ? 0 : scale.place(weight))}%`;
    ticks.append(tick);
  }
  const below = negative ? " Lower half: negative weights, which exact attention never has." : "";
  host.replaceChildren(
    bar,
    ticks,
    element("p", `Attention weight, logarithmic. “Even” is the weight if all keys were read alike.${below}`),
  );
}
