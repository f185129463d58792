// The page: what is drawn where, from the report's data.

const report = JSON.parse(document.getElementById("data").textContent);
const METHODS = Object.keys(report.methods);
const longest = report.speed.lengths.length - 1;
const tokens = report.speed.lengths[longest].toLocaleString("en");
const drawable = (error) => Math.max(error, 1e-4); // on a logarithmic axis
const nameOf = (id) => (id === "exact" ? "Exact" : id === "recommended" ? "Recommended" : report.settings[id].label);
const swept = (id) => report.settings[id].options[report.methods[report.settings[id].method].swept];
const idsOf = (method) => Object.keys(report.settings).filter((id) => report.settings[id].method === method);
const target = { y: report.target_error, name: `target ${report.target_error}` };
const swapped = report.layers.some((layer) => layer.recommended !== "exact");
const at = (id) => document.getElementById(id);

/** Radio buttons in a fieldset: arrow keys move between them without any help. */
function choice(fieldset, names, chosen, change) {
  fieldset.querySelectorAll("label").forEach((old) => old.remove());
  names.forEach((name, i) => {
    const label = element("label"),
      input = element("input");
    Object.assign(input, { type: "radio", name: fieldset.id, checked: i === chosen });
    input.addEventListener("change", () => change(i));
    label.append(input, element("span", name));
    fieldset.append(label);
  });
  fieldset.hidden = false;
}

function drawTrade() {
  const point = (id) => {
    const option = report.options[id],
      ratio = option.attention_speed_up[longest];
    return [
      ratio,
      drawable(option.hidden_error),
      `${nameOf(id)}: hidden-state error ${digits(option.hidden_error)}, attention speed-up ${digits(ratio)}×`,
    ];
  };
  const series = METHODS.map((method) => ({
    name: report.methods[method].title,
    kind: method,
    points: idsOf(method).map(point),
  }));
  const recommended = point("recommended");
  if (swapped) series.push({ name: "Recommended", kind: "recommended", points: [recommended], line: false });
  chart(at("trade"), {
    title: "Hidden-state error against speed",
    x: { name: `attention speed-up at ${tokens} tokens (×)`, log: true },
    y: { name: "hidden-state error (relative)", log: true },
    series,
    hint: "Lower right is better.",
  });
}

function drawByLayer() {
  const best = (layer, method) => idsOf(method).reduce((a, b) => (layer.error[a] <= layer.error[b] ? a : b));
  const series = METHODS.map((method) => ({
    name: report.methods[method].title,
    kind: method,
    points: report.layers.map((layer) => {
      const id = best(layer, method);
      return [
        layer.index,
        drawable(layer.error[id]),
        `Layer ${layer.index}: ${nameOf(id)}, error ${digits(layer.error[id])}`,
      ];
    }),
  }));
  chart(at("by-layer"), {
    title: "Error by layer, each method at its closest setting",
    x: { name: "layer", ticks: report.layers.map((layer) => layer.index), format: String },
    y: { name: "error (relative)", log: true },
    series,
    rules: [target],
  });
}

function showMaps() {
  const group = report.heads[0].group,
    side = report.heads[0].side;
  const n = report.texts.length;
  const cells =
    `The ${n} × ${n} weights are drawn as ${side} × ${side} cells: each shows what ${group} neighbouring queries read, ` +
    `on average, of ${group} neighbouring keys together.`;
  at("maps-words").textContent =
    `What each query token reads of each key token in the first text. ${group > 1 ? cells : "Every weight is drawn."}`;
  const show = mapViewer(report, (query, key, exact, approximate) => {
    const part = (name, number, text, classes) => {
      const box = element("div", "", classes);
      box.append(element("span", number === "" ? name : `${name} ${number}`, "soft"), element("b", text));
      return box;
    };
    at("readout").replaceChildren(
      part(group > 1 ? "query tokens" : "query token", query.place, query.text),
      part(group > 1 ? "key tokens" : "key token", key.place, key.text),
      part("exact", "", digits(exact), "number"),
      part("approximate", "", digits(approximate), "number"),
    );
  });
  const pick = (i) => {
    const head = report.heads[i],
      ids = Object.keys(head.approximate);
    const error = (id) => digits(report.layers[head.layer].head_error[id][head.head]);
    choice(
      at("map-choice"),
      ids.map((id) => `${nameOf(id)}: error ${error(id)}`),
      0,
      (j) => show(head, ids[j]),
    );
    show(head, ids[0]);
  };
  at("maps-host").hidden = false;
  choice(
    at("head-choice"),
    report.heads.map((head) => `${head.layer}:${head.head}, ${head.why}`),
    0,
    pick,
  );
  pick(0);
}

function drawSpeed() {
  const { lengths, ms, measured } = report.speed,
    layers = report.layers.length;
  const words = (what, n, number, known) =>
    `${what}, ${n.toLocaleString("en")} tokens: ${number}${known ? "" : ", extrapolated"}`;
  const closest = (method) =>
    idsOf(method).reduce((a, b) => (report.options[a].error_mean <= report.options[b].error_mean ? a : b));
  const line = (id) =>
    lengths.map((n, i) => {
      const total = layers * ms[id][i];
      return [n, total, words(nameOf(id), n, `${digits(total)} ms`, measured[id][i]), !measured[id][i]];
    });
  const shown = [{ name: "Exact (dashed: extrapolated)", kind: "exact", points: line("exact") }];
  for (const method of METHODS)
    shown.push({ name: nameOf(closest(method)), kind: method, points: line(closest(method)) });
  const option = report.options.recommended;
  if (swapped)
    shown.push({
      name: "Recommended",
      kind: "recommended",
      style: "thick",
      points: lengths.map((n, i) => [
        n,
        option.attention_ms[i],
        words("Recommended", n, `${digits(option.attention_ms[i])} ms`, option.measured[i]),
        !option.measured[i],
      ]),
    });
  const x = { name: "length (tokens)", log: true, ticks: lengths, format: (n) => n.toLocaleString("en") };
  chart(at("times"), {
    title: "Time of all layers' attention",
    x,
    y: { name: "milliseconds per text", log: true },
    series: shown,
  });
  const answer = report.options[report.answer.option],
    kind = swapped ? "recommended" : report.settings[report.answer.option].method;
  const both = answer.measured.map((known, i) => known && measured.exact[i]);
  const ratio = (values, what) =>
    lengths.map((n, i) => [n, values[i], words(what, n, `speed-up ${digits(values[i])}×`, both[i]), !both[i]]);
  chart(at("ratios"), {
    title: `Speed-up of ${swapped ? "the recommendation" : nameOf(report.answer.option)}`,
    x,
    y: { name: "times faster than exact", log: true },
    series: [
      { name: "attention", kind, points: ratio(answer.attention_speed_up, "Attention") },
      { name: "whole encoder", kind: "exact", points: ratio(answer.model_speed_up, "Encoder") },
    ],
    rules: [{ y: 1, name: "as fast" }],
  });
}

function offerCopy() {
  const button = at("copy");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(at("code").textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(at("code"));
      button.textContent = "Selected";
    }
  });
}

drawTrade();
drawByLayer();
at("layer").hidden = false;
choice(
  at("layer-choice"),
  report.layers.map((layer) => String(layer.index)),
  0,
  showLayer,
);
showLayer(0);
showMaps();
drawSpeed();
offerCopy();
