// Previews of a training: a row for each prompt, a column for each step.

import { show } from "./api.js";
import { h, put } from "./dom.js";

/** Shows the previews that events tell of. */
export function samples(place, id, events) {
  const prompts = new Map(events.map(({ number, prompt }) => [number, prompt]));
  const steps = [...new Set(events.map(({ step }) => step))].sort((one, other) => one - other);
  const cell = (number, step) => {
    const event = events.findLast((one) => one.number === number && one.step === step);
    if (!event) {
      return h("td", {});
    }
    const image = h("img", { alt: `${event.prompt}, after ${step} steps` });
    show(image, `/trainer/jobs/${id}/pictures/${event.path}`);
    return h("td", {}, image);
  };
  put(place, h("h2", {}, "Previews"),
    h("div", { class: "samples", tabindex: "0", role: "region", "aria-label": "Previews by step" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Prompt"),
        steps.map((step) => h("th", { scope: "col" }, step ? `Step ${step}` : "Base model")))),
      h("tbody", {}, [...prompts].sort(([one], [other]) => one - other).map(([number, prompt]) =>
        h("tr", {}, h("th", { scope: "row" }, prompt), steps.map((step) => cell(number, step))))))));
}
