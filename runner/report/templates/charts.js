// The curves of one run, or of several over each other, by Observable Plot. Colours are CSS variables.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  const alone = runs.length === 1;
  const KINDS = {
    preemption: "var(--accent)", restart: "var(--bad)", damage: "var(--bad)", batch: "var(--warn)",
    change: "var(--violet)", best: "var(--good)", early: "var(--muted)",
  };
  const colour = (at) => `var(--run-${(at % 6) + 1})`;
  const short = (value) => (value == null ? "–" : Number(value.toPrecision(4)).toString());

  const rows = (run, name) => {
    const curve = run.curves[name];
    return curve.step.map((step, at) =>
      ({ step, value: curve.value[at], low: curve.low[at], high: curve.high[at], run: run.name }));
  };

  // Marks that stand on one step share a line and a label.
  const grouped = (marks) => {
    const steps = d3.group(marks, (mark) => mark.step);
    return [...steps].map(([step, all]) => ({
      step, kind: all[0].kind,
      label: all.map((mark) => mark.number).join(","),
      title: all.map((mark) => `${mark.number}: ${mark.title}`).join("\n"),
    }));
  };

  const marksOf = (run) => grouped(run.marks).flatMap((mark) => [
    Plot.ruleX([mark], {
      x: "step", stroke: KINDS[mark.kind], strokeWidth: 1.5, strokeDasharray: "4 3",
      title: "title", ariaLabel: () => `mark ${mark.kind}`,
    }),
    Plot.text([mark], {
      x: "step", text: "label", frameAnchor: "top", dy: -12, fontWeight: 650, fontSize: 11,
      fill: KINDS[mark.kind], ariaLabel: () => `mark label ${mark.label}`,
    }),
  ]);

  const line = (run, at, name) => {
    const points = rows(run, name);
    const noisy = name === "loss" && points.length >= 60;
    const smooth = Plot.windowY({ k: Math.max(5, Math.round(points.length / 25)), anchor: "middle" },
      { x: "step", y: "value", stroke: colour(at), strokeWidth: 2 });
    return [
      points.some((point) => point.high > point.low)
        ? Plot.areaY(points, { x: "step", y1: "low", y2: "high", fill: colour(at), fillOpacity: 0.12 }) : null,
      Plot.lineY(points, {
        x: "step", y: "value", stroke: colour(at), strokeWidth: noisy ? 1 : 2, strokeOpacity: noisy ? 0.35 : 1,
      }),
      noisy ? Plot.lineY(points, smooth) : null,
      points.length === 1 ? Plot.dot(points, { x: "step", y: "value", fill: colour(at) }) : null,
      Plot.tip(points, Plot.pointerX({
        x: "step", y: "value",
        title: (point) => `${alone ? "" : `${point.run}\n`}step ${point.step}\n${short(point.value)}`,
      })),
    ];
  };

  const dots = (run, at, values) => [
    Plot.ruleX(values.filter((one) => one.low != null),
      { x: "step", y1: "low", y2: "high", stroke: colour(at), strokeOpacity: 0.4, strokeWidth: 4 }),
    Plot.lineY(values, { x: "step", y: "value", stroke: colour(at), strokeWidth: 2 }),
    Plot.dot(values, { x: "step", y: "value", fill: colour(at), r: 4 }),
    Plot.tip(values, Plot.pointer({
      x: "step", y: "value",
      title: (one) => `${alone ? "" : `${run.name}\n`}step ${one.step}, ${one.when}\n${short(one.value)}` +
        (one.low == null ? "" : ` [${short(one.low)}, ${short(one.high)}]`),
    })),
  ];

  const evalLoss = (run) => run.eval_loss.length === 0 ? [] : [
    Plot.lineY(run.eval_loss, { x: "step", y: "value", stroke: "var(--run-2)", strokeWidth: 2 }),
    Plot.dot(run.eval_loss, { x: "step", y: "value", fill: "var(--run-2)", r: 3 }),
  ];

  const CHARTS = {
    loss: { height: 280, draw: (run, at) => [...line(run, at, "loss"), ...(alone ? evalLoss(run) : [])] },
    evaluated: {
      height: 190, draw: (run, at) => dots(run, at, run.evaluated), y: data.share ? { domain: [0, 1] } : {},
    },
    grad_norm: { height: 190, draw: (run, at) => line(run, at, "grad_norm") },
    learning_rate: { height: 190, draw: (run, at) => line(run, at, "learning_rate"), y: { tickFormat: "~g" } },
  };

  const last = d3.max(runs, (run) => d3.max([
    ...run.curves.loss.step, ...run.evaluated.map((one) => one.step), ...run.marks.map((mark) => mark.step), 1,
  ]));

  const LOG = { type: "log", tickFormat: "~g", nice: false };
  const logarithmic = (figure) => figure.querySelector("button.log[aria-pressed=true]") !== null;

  const draw = (figure) => {
    const place = figure.querySelector(".plot");
    const width = place.clientWidth;
    if (!width) return;
    const chart = CHARTS[figure.dataset.chart];
    const title = figure.querySelector("figcaption b").textContent;
    const plot = Plot.plot({
      width, height: chart.height,
      marginTop: 26, marginRight: 12, marginBottom: 34, marginLeft: 48,
      style: { background: "none", color: "var(--text)", fontSize: "12px" },
      x: { domain: [0, last], label: "step", ticks: Math.min(last, width / 90), tickFormat: (step) =>
        (Number.isInteger(step) ? step.toLocaleString("en") : "") },
      y: { grid: true, nice: true, label: null, ticks: 5, ...chart.y, ...(logarithmic(figure) ? LOG : {}) },
      marks: [
        ...(alone ? marksOf(runs[0]) : []),
        ...runs.flatMap((run, at) => chart.draw(run, at)),
      ],
    });
    const svg = plot.matches("svg") ? plot : plot.querySelector("svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", alone
      ? `${title} over ${last} steps${runs[0].marks.length ? `, with ${runs[0].marks.length} marks that are listed below` : ""}`
      : `${title} over ${last} steps of ${runs.map((run) => run.name).join(", ")}`);
    place.replaceChildren(plot);
  };

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  let drawn = 0;
  const all = () => {
    if (window.innerWidth === drawn) return;
    drawn = window.innerWidth;
    figures.forEach(draw);
  };
  all();
  for (const button of document.querySelectorAll("button.log")) {
    // A logarithm wants what is above zero; a loss of dpo may be all of that, and need not.
    button.hidden = !runs.every((run) => run.curves.loss.low.every((value) => value > 0));
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      draw(button.closest("figure"));
    });
  }
  window.addEventListener("resize", () => requestAnimationFrame(all));
})();
