"use strict";
// The values of the step nearest to the pointer, beside it.
const charts = JSON.parse(document.getElementById("numbers").textContent);
const written = (value, form) =>
  form === "power" ? value.toExponential(2) : form === "si" ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
for (const plot of document.querySelectorAll(".plot")) {
  const rule = document.createElement("span"), readout = document.createElement("span");
  rule.className = "rule";
  readout.className = "readout";
  const last = Number(plot.dataset.last);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * last;
    const steps = charts[plot.dataset.chart].flatMap((curve) => curve.points.map((point) => point[0]));
    const step = steps.reduce((best, each) => (Math.abs(each - at) < Math.abs(best - at) ? each : best));
    const head = document.createElement("b");
    head.textContent = `step ${step}`;
    const lines = [head];
    for (const curve of charts[plot.dataset.chart]) {
      const point = curve.points.find((each) => each[0] === step);
      if (!point || point[1] === null) continue;
      const line = document.createElement("span");
      line.className = `key c${curve.colour} line`;
      line.textContent = `${curve.name} ${written(point[1], plot.dataset.form)}`;
      lines.push(line);
    }
    readout.replaceChildren(...lines);
    rule.style.left = `${(100 * step) / last}%`;
    const right = step / last > 0.5;
    readout.style.left = right ? "auto" : `calc(${(100 * step) / last}% + 10px)`;
    readout.style.right = right ? `calc(${100 - (100 * step) / last}% + 10px)` : "auto";
    plot.append(rule, readout);
  });
  plot.addEventListener("pointerleave", () => { rule.remove(); readout.remove(); });
}
