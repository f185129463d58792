"use strict";
// Line charts in SVG, drawn to the width they have; a pointer or the arrow keys read their points.

const SPACE = { right: 22, top: 12, bottom: 42 };
const LETTER = 7; // width of a digit of a label (pixels)
const HEIGHT = 270;

/** An HTML element with a text and a class; any text stays text. */
function element(name, text = "", classes = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

/** An SVG element. */
function shape(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/** A number with as many digits as it deserves. */
function digits(x) {
  if (x === 0) return "0";
  if (x < 0) return `−${digits(-x)}`;
  if (x >= 100) return Math.round(x).toLocaleString("en");
  if (x >= 0.001) return String(Number(x.toPrecision(3)));
  const [front, power] = x.toExponential(1).split("e-");
  const raised = [...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
  return front === "1.0" ? `10⁻${raised}` : `${front} × 10⁻${raised}`;
}

/** Round ticks over [low, high], at most so many: on a logarithmic axis powers of ten, and their doubles and halves. */
function ticksOf(low, high, log, most) {
  if (log) {
    const stride = Math.ceil(Math.log10(high / low) / most);
    for (const [steps, every] of [
      [[1, 2, 5], 1],
      [[1], 1],
      [[1], stride],
    ]) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += every)
        found.push(...steps.map((step) => step * 10 ** e).filter((x) => x >= low * 0.999 && x <= high * 1.001));
      if (found.length > 1 && found.length <= most) return found;
    }
  }
  const rough = (high - low) / most,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * 1.0001; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** An axis from values to pixels. */
function axis(spec, values, from, to) {
  let [low, high] = spec.domain ?? [Math.min(...values), Math.max(...values)];
  if (spec.log && !spec.domain && !spec.ticks) [low, high] = [low / 1.15, high * 1.15];
  if (low === high) [low, high] = spec.log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const scale = spec.log ? Math.log : (x) => x;
  const most = Math.max(2, Math.floor(Math.abs(to - from) / (spec.room ?? 46)));
  const place = (x) => from + ((scale(x) - scale(low)) / (scale(high) - scale(low))) * (to - from);
  const format = spec.format ?? digits;
  let ticks = spec.ticks ?? ticksOf(low, high, spec.log, most);
  if (spec.ticks) {
    let free = -Infinity;
    ticks = ticks.filter((x) => {
      const wide = LETTER * format(x).length;
      if (place(x) - wide / 2 < free) return false;
      free = place(x) + wide / 2 + LETTER;
      return true;
    });
  }
  return { place, ticks, format };
}

/** A mark around a point: each series has its own form, so that colour is not needed to tell them apart. */
function mark(form, x, y, classes) {
  const r = 4;
  const corners = {
    triangle: [
      [0, -5],
      [4.8, 3.6],
      [-4.8, 3.6],
    ],
    diamond: [
      [0, -5.4],
      [5.4, 0],
      [0, 5.4],
      [-5.4, 0],
    ],
  };
  if (corners[form])
    return shape("polygon", { class: classes, points: corners[form].map(([a, b]) => `${x + a},${y + b}`).join(" ") });
  if (form === "square") return shape("rect", { class: classes, x: x - r, y: y - r, width: 2 * r, height: 2 * r });
  return shape("circle", { class: classes, cx: x, cy: y, r });
}

const FORMS = {
  nystrom: "circle",
  spectral_shift: "square",
  residual: "triangle",
  recommended: "diamond",
  exact: "square",
};

/** The key to a chart's series. */
function legend(series) {
  const list = element("ul", "", "legend");
  for (const each of series.filter((x) => x.name)) {
    const item = element("li"),
      icon = shape("svg", { class: `is-${each.kind}`, viewBox: "0 0 22 12", "aria-hidden": "true" });
    if (each.line !== false) icon.append(shape("path", { class: `curve ${each.style ?? ""}`, d: "M0 6H22" }));
    if (each.marks !== false) icon.append(mark(FORMS[each.kind], 11, 6, "mark"));
    item.append(icon, each.name);
    list.append(item);
  }
  return list;
}

/**
 * Fill a figure with a chart.
 *
 * spec: title; x, y: {name, log, domain, ticks, format}; series: [{name, kind, points: [[x, y, words, hollow]], style,
 * line, marks, band: [[x, low, high]]}]; rules: [{y or x, name}].
 */
function chart(figure, spec) {
  const picture = shape("svg", { class: "chart", role: "img", tabindex: "0" });
  const words = element("p", "", "point-words");
  figure.replaceChildren(element("figcaption", spec.title), legend(spec.series), picture, words);
  picture.setAttribute(
    "aria-label",
    `${spec.title}. ${spec.y.name} against ${spec.x.name}. Arrow keys read the points.`,
  );
  const resting = spec.hint ?? "";
  words.textContent = resting;
  let points = [],
    ring = null,
    at = -1;

  function draw() {
    const width = figure.clientWidth;
    if (!width) return;
    const values = (i) => spec.series.flatMap((each) => each.points.map((point) => point[i]));
    const rules = (spec.rules ?? []).flatMap((rule) => rule.y ?? []);
    const y = axis({ room: 34, ...spec.y }, [...values(1), ...rules], HEIGHT - SPACE.bottom, SPACE.top);
    const left = 26 + LETTER * Math.max(...y.ticks.map((tick) => y.format(tick).length));
    const x = axis(spec.x, values(0), left, width - SPACE.right);
    const box = { left, right: width - SPACE.right, top: SPACE.top, bottom: HEIGHT - SPACE.bottom };
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    picture.setAttribute("height", HEIGHT);
    picture.replaceChildren(...axes(spec, x, y, box));
    points = [];
    for (const each of spec.series) picture.append(curve(each, x, y, points));
    for (const rule of spec.rules ?? []) picture.append(...ruled(rule, x, y, box));
    ring = shape("circle", { class: "ring", r: 8, visibility: "hidden" });
    picture.append(ring);
  }

  function read(place) {
    at = place;
    ring.setAttribute("visibility", at < 0 ? "hidden" : "visible");
    words.textContent = at < 0 ? resting : points[at].words;
    if (at < 0) return;
    ring.setAttribute("cx", points[at].x);
    ring.setAttribute("cy", points[at].y);
  }

  function nearest(event) {
    const box = picture.getBoundingClientRect();
    const far = points.map((p) => (p.x - event.clientX + box.left) ** 2 + (p.y - event.clientY + box.top) ** 2);
    if (points.length) read(far.indexOf(Math.min(...far)));
  }

  picture.addEventListener("pointermove", nearest);
  picture.addEventListener("pointerdown", nearest);
  picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read(-1)); // not a finger's end
  picture.addEventListener("blur", () => read(-1));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !points.length) return;
    event.preventDefault();
    read((at + step + points.length) % points.length);
  });
  figure.watch?.disconnect();
  figure.watch = new ResizeObserver(draw);
  figure.watch.observe(figure);
  draw();
}

function axes(spec, x, y, { left, right, top, bottom }) {
  const made = [],
    centred = { class: "axis-name", "text-anchor": "middle" };
  for (const tick of y.ticks) {
    made.push(shape("line", { class: "grid", x1: left, x2: right, y1: y.place(tick), y2: y.place(tick) }));
    made.push(shape("text", { x: left - 7, y: y.place(tick) + 4, "text-anchor": "end" }, y.format(tick)));
  }
  for (const tick of x.ticks) {
    made.push(shape("line", { class: "grid", x1: x.place(tick), x2: x.place(tick), y1: bottom, y2: bottom + 5 }));
    made.push(shape("text", { x: x.place(tick), y: bottom + 18, "text-anchor": "middle" }, x.format(tick)));
  }
  const middle = (top + bottom) / 2;
  made.push(shape("text", { ...centred, x: (left + right) / 2, y: HEIGHT - 5 }, spec.x.name));
  made.push(shape("text", { ...centred, x: 11, y: middle, transform: `rotate(-90 11 ${middle})` }, spec.y.name));
  return made;
}

function curve(each, x, y, points) {
  const group = shape("g", { class: `is-${each.kind}` });
  const path = (places) =>
    places.map(([a, b], i) => `${i ? "L" : "M"}${x.place(a).toFixed(1)} ${y.place(b).toFixed(1)}`).join("");
  if (each.band) {
    const low = each.band.map(([a, b]) => [a, b]),
      high = each.band.map(([a, , c]) => [a, c]).reverse();
    group.append(shape("path", { class: "band", d: `${path([...low, ...high])}Z` }));
  }
  if (each.line !== false && each.points.length > 1) {
    const solid = each.points.filter((point) => !point[3]),
      beyond = each.points.slice(Math.max(0, solid.length - 1));
    group.append(shape("path", { class: `curve ${each.style ?? ""}`, d: path(solid) }));
    if (solid.length < each.points.length)
      group.append(shape("path", { class: `curve dashed ${each.style ?? ""}`, d: path(beyond) }));
  }
  for (const [a, b, words, hollow] of each.points) {
    if (each.marks !== false)
      group.append(mark(FORMS[each.kind], x.place(a), y.place(b), hollow ? "mark hollow" : "mark"));
    if (words) points.push({ x: x.place(a), y: y.place(b), words });
  }
  return group;
}

function ruled(rule, x, y, { left, right, top, bottom }) {
  if (rule.y !== undefined) {
    const at = y.place(rule.y);
    return [
      shape("line", { class: "rule", x1: left, x2: right, y1: at, y2: at }),
      shape("text", { class: "rule-name", x: right, y: at - 5, "text-anchor": "end" }, rule.name),
    ];
  }
  const at = x.place(rule.x),
    late = at > (left + right) / 2;
  const name = {
    class: "rule-name",
    x: at + (late ? -5 : 5),
    y: top + (rule.down ?? 12),
    "text-anchor": late ? "end" : "start",
  };
  return [shape("line", { class: "rule", x1: at, x2: at, y1: top, y2: bottom }), shape("text", name, rule.name)];
}
