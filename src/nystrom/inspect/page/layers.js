// One layer: its spectrum, its heads, its error against what can be set.

function drawSpectrum(layer) {
  const values = layer.singular_values;
  const other = report.layers.filter((each) => each !== layer);
  const low = 1e-5;
  const floor = (x) => Math.max(x, low);
  const faint = other.map((each, i) => ({
    name: i ? "" : "other layers",
    kind: "faint",
    style: "thin",
    marks: false,
    points: each.singular_values.rank
      .map((rank, j) => [rank, each.singular_values.median[j]])
      .filter((point) => point[1] >= low),
  }));
  const own = {
    name: "median head (band: all heads)",
    kind: "nystrom",
    marks: false,
    points: values.rank
      .map((rank, i) => [
        rank,
        values.median[i],
        `Singular value ${rank}: ${digits(values.median[i])} of the largest ` +
          `(heads ${digits(values.least[i])} to ${digits(values.most[i])})`,
      ])
      .filter((point) => point[1] >= low),
    band: values.rank.map((rank, i) => [rank, floor(values.least[i]), floor(values.most[i])]),
  };
  chart(at("spectrum"), {
    title: "Singular values of the exact attention matrices",
    x: { name: "rank (count)", domain: [1, report.texts.length] },
    y: { name: "part of the largest", log: true, domain: [low, 1.3], room: 30 },
    series: [...faint, own],
    rules: [
      { x: layer.rank90, name: `90 % in ${layer.rank90}` },
      { x: layer.rank99, name: `99 % in ${layer.rank99}`, down: 28 },
    ],
  });
}

function drawHeads(layer) {
  const errors = layer.head_error[layer.shown];
  chart(at("heads-error"), {
    title: `Error of each head: ${nameOf(layer.shown)}`,
    x: { name: "head", ticks: errors.map((_, i) => i), format: String },
    y: { name: "error (relative)", domain: [0, 1.1 * Math.max(report.target_error, ...errors)] },
    series: [
      {
        name: "",
        kind: report.settings[layer.shown].method,
        line: false,
        points: errors.map((x, i) => [i, x, `Head ${i}: error ${digits(x)}`]),
      },
    ],
    rules: [target],
  });
}

function drawSweep(figure, layer, methods, title, name, domain) {
  const series = methods.map((method) => ({
    name: report.methods[method].title,
    kind: method,
    points: idsOf(method).map((id) => [
      swept(id),
      drawable(layer.error[id]),
      `${nameOf(id)}: error ${digits(layer.error[id])}`,
    ]),
  }));
  const ticks = series[0].points.map((point) => point[0]);
  chart(figure, {
    title,
    x: { name, log: true, ticks, format: String },
    y: { name: "error (relative)", log: true, domain },
    series,
    rules: [target],
  });
}

function showLayer(i) {
  const layer = report.layers[i],
    exact = layer.recommended === "exact";
  const errors = [report.target_error, ...report.layers.flatMap((each) => Object.values(each.error).map(drawable))];
  const domain = [Math.min(...errors) / 1.2, Math.max(...errors) * 1.2];
  const what = exact ? "keep exact attention" : nameOf(layer.recommended);
  const which = exact ? `The closest, ${nameOf(layer.closest)},` : "It";
  const error = `${which} has an error of ${digits(layer.error[layer.shown])}.`;
  at("layer-words").textContent = `Layer ${layer.index}: ${what}, ${layer.reason}. ${error}`;
  at("layer-code").textContent = report.settings[layer.shown].code;
  drawSpectrum(layer);
  drawHeads(layer);
  const fixed = report.settings[idsOf("residual")[0]].options.num_landmarks;
  drawSweep(
    at("by-landmarks"),
    layer,
    ["nystrom", "spectral_shift"],
    "Error against landmarks",
    "landmarks per head (count)",
    domain,
  );
  drawSweep(
    at("by-top-k"),
    layer,
    ["residual"],
    `Error against exact keys, with ${fixed} landmarks`,
    "exact keys per block (top-k, count)",
    domain,
  );
}
