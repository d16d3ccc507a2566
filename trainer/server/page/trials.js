// Prompts tried with what was trained, at any strength.

import { get, Lost, post, show, wait } from "./api.js";
import { field, h, newId, put, say } from "./dom.js";
import { clearProblems, showProblems } from "./problems.js";

const LOOK_SECONDS = 1;

/** The form and the pictures that were asked for. */
export function trials(place, job, signal) {
  const list = h("ul", { class: "trials", "aria-label": "Pictures" });
  const summary = h("div", {});
  const fields = controls(job);
  const make = h("button", { type: "submit", class: "main" }, "Make pictures");
  const form = h("form", { class: "card", novalidate: true, onsubmit: async (event) => {
    event.preventDefault();
    clearProblems(form);
    make.disabled = true;
    try {
      const made = await post(`/trainer/jobs/${job.id}/generations`, fields.wanted());
      list.prepend(...trial({ id: made.id, wanted: fields.wanted() }, signal));
      say("The pictures are in the queue");
    } catch (error) {
      showProblems(form, summary, error);
    }
    make.disabled = false;
  } }, fields.elements, summary, h("div", { class: "actions" }, make));
  put(place, h("h2", {}, "Try it"), form, list);
  list.append(...job.trials.flatMap((one) => trial(one, signal)));
}

function controls(job) {
  const said = job.options.validation_prompts?.[0] ?? job.options.instance_prompt ?? "a photograph of TOK";
  const prompt = h("textarea", { rows: 2, value: said });
  const strength = h("input", { type: "range", id: newId("strength"), min: "0", max: "1.5", step: "0.05" });
  strength.value = "1";
  const output = h("output", { for: strength.id }, "1");
  strength.addEventListener("input", () => { output.textContent = String(Number(strength.value)); });
  const texts = {
    negative_prompt: ["What they do not show", ""], seed: ["Seed", "0"], num_images: ["How many", "1"],
    num_inference_steps: ["Steps", ""], guidance_scale: ["Guidance", ""],
  };
  const others = Object.fromEntries(Object.entries(texts).map(([name, [label, value]]) =>
    [name, { label, control: h("input", { type: "text", autocomplete: "off", inputmode: name === "negative_prompt" ? null : "decimal", value, placeholder: value ? "" : "the model's own" }) }]));
  return {
    elements: [
      field("Prompt", prompt, "", { name: "prompt" }),
      h("div", { class: "field", "data-field": "strength" }, h("label", { for: strength.id }, "Strength"),
        h("div", { class: "range" }, strength, output),
        h("p", { class: "hint" }, "0 is the base model, 1 what was trained. The same seed begins with the same noise.")),
      h("div", { class: "pair" }, Object.entries(others).map(([name, { label, control }]) => field(label, control, "", { name }))),
    ],
    wanted: () => ({
      prompt: prompt.value.trim(), strength: Number(strength.value),
      ...Object.fromEntries(Object.entries(others).map(([name, { control }]) => [name, valueOf(name, control.value.trim())])
        .filter(([, value]) => value !== "")),
    }),
  };
}

function valueOf(name, text) {
  return name !== "negative_prompt" && text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

/** The places of a trial's pictures, filled when they are there. */
function trial({ id, wanted }, signal) {
  const items = Array.from({ length: wanted.num_images ?? 1 }, () => h("li", {},
    h("div", { class: "waiting", role: "status" }, "on its way"),
    h("p", { class: "hint" }, `${wanted.prompt} · strength ${wanted.strength ?? 1} · seed ${wanted.seed ?? 0}`)));
  fill(id, items, signal, wanted);
  return items;
}

async function fill(id, items, signal, wanted) {
  while (!signal.aborted) {
    try {
      const { state, files, failure } = await get(`/trainer/jobs/${id}`);
      if (state === "done") {
        files.forEach(({ address }, number) => {
          const image = h("img", { alt: `${wanted.prompt}, strength ${wanted.strength ?? 1}` });
          show(image, address);
          items[number]?.firstChild.replaceWith(h("a", { href: address, target: "_blank", rel: "noopener" }, image));
        });
        say("The pictures are there");
        return;
      }
      if (!["queued", "running"].includes(state)) {
        const text = failure ? `${failure.message}${failure.hint ? `; ${failure.hint}` : ""}` : "cancelled";
        items.forEach((item) => item.firstChild.replaceWith(h("p", { class: "problem", role: "alert" }, text)));
        return;
      }
    } catch (error) {
      if (!(error instanceof Lost)) {
        items.forEach((item) => item.firstChild.replaceWith(h("p", { class: "problem" }, error.message)));
        return;
      }
    }
    await wait(LOOK_SECONDS);
  }
}
