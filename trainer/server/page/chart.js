// The loss as a drawing: each step's, smoothed, and of validation where it is measured.

import { h, put, s } from "./dom.js";

const WIDEST = 1048, NARROWEST = 280, HEIGHT = 250;
const LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 30;
const MOST_POINTS = 800;

/** Losses as they come. */
export class Chart {
  constructor() {
    this.begin();
    this.element = h("div", {});
  }

  begin() {
    this.raw = [];
    this.smooth = [];
    this.validation = [];
    this.total = 0;
  }

  /** Takes an event of the log. */
  take(event) {
    if (event.event === "run") {
      this.total = event.total_steps;
    } else if (event.event === "step" && Number.isFinite(event.loss)) {
      this.raw.push([event.step, event.loss]);
      const before = this.smooth.at(-1)?.[1] ?? event.loss;
      this.smooth.push([event.step, event.smoothed_loss ?? before * 0.95 + event.loss * 0.05]);
    } else if (event.event === "measures" && Number.isFinite(event.values?.["validation/loss"])) {
      this.validation.push([event.step, event.values["validation/loss"]]);
    }
  }

  draw() {
    if (this.raw.length < 2) {
      put(this.element);
      return;
    }
    const [now, smooth] = [this.raw.at(-1)[1], this.smooth.at(-1)[1]];
    const steps = Math.max(this.total, this.raw.at(-1)[0]);
    const ordered = this.raw.map(([, loss]) => loss).sort((one, other) => one - other);
    // One wild step is not to press all others flat.
    const most = Math.max(ordered[Math.floor((ordered.length - 1) * 0.985)], ...this.smooth.map(([, loss]) => loss),
      ...this.validation.map(([, loss]) => loss)) * 1.08 || 1;
    const y = (loss) => TOP + (1 - Math.min(1, loss / most)) * (HEIGHT - TOP - BOTTOM);
    // As wide as it is shown, so that its letters have their size.
    const width = Math.min(WIDEST, Math.max(NARROWEST, this.element.clientWidth));
    const x = (step) => LEFT + (step / steps) * (width - LEFT - RIGHT);
    const words = `Loss over the steps: now ${now.toFixed(4)}, smoothed ${smooth.toFixed(4)}`;
    put(this.element,
      s("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": words },
        ticks(most, 4).map((loss) => [
          s("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y(loss), y2: y(loss) }),
          s("text", { x: LEFT - 8, y: y(loss) + 4, "text-anchor": "end" }, short(loss)),
        ]),
        ticks(steps, width > 500 ? 6 : 3).map((step) => s("text", { x: x(step), y: HEIGHT - 8, "text-anchor": "middle" }, String(step))),
        s("path", { class: "raw", d: line(this.raw, x, y) }),
        s("path", { class: "smooth", d: line(this.smooth, x, y) }),
        this.validation.map(([step, loss]) => s("circle", { class: "validation", cx: x(step), cy: y(loss), r: 4 }))),
      h("p", { class: "keys number" }, h("span", {}, `Loss ${now.toFixed(4)}`), h("span", {}, `smoothed ${smooth.toFixed(4)}`),
        this.validation.length > 0 && h("span", {}, `validation ${this.validation.at(-1)[1].toFixed(4)} (rings)`)));
  }
}

function line(points, x, y) {
  const stride = Math.ceil(points.length / MOST_POINTS);
  const some = points.filter((_, number) => number % stride === 0 || number === points.length - 1);
  return some.map(([step, value], number) => `${number ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

/** Round numbers from 0 to a largest one. */
function ticks(most, number) {
  const rough = most / number;
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return Array.from({ length: Math.floor(most / stride) + 1 }, (_, place) => place * stride);
}

const short = (number) => String(Number(number.toPrecision(3)));
