// The second step: what the pictures show, on which model, and any option there is.

import { get, Lost, post, wait } from "./api.js";
import { field, h, put, say, ticked } from "./dom.js";
import { BESIDE, draft, keep, submission } from "./draft.js";
import { chips, Options } from "./options.js";
import { at, clearProblems, showProblems } from "./problems.js";

const SUBJECTS = {
  person: ["A person", "Faces stay in the picture"],
  product: ["A thing", "Shape and lettering, never mirrored"],
  style: ["A style", "A manner of drawing or photographing"],
  "": ["Something else", "The usual settings"],
};
const USUAL_MODEL = "model_url";
const CHECK_SECONDS = 0.35;

/** The view. */
export async function settings(main, signal) {
  put(main, h("h1", { tabindex: "-1" }, "What and how"), h("p", { class: "soft", role: "status" }, "One moment"));
  const form = await asked(signal);
  if (!signal.aborted) {
    const view = new View(form);
    put(main, ...view.parts());
    await view.check();
  }
}

async function asked(signal) {
  while (!signal.aborted) {
    try {
      return await get("/trainer/form");
    } catch (error) {
      if (!(error instanceof Lost)) {
        throw error;
      }
    }
    await wait(1);
  }
  return null;
}

class View {
  constructor(form) {
    this.form = form;
    this.mains = new Map();
    this.options = new Options(form.sections, draft.options, () => this.changed());
    this.summary = h("div", {});
    this.chips = h("ul", { class: "chips", "aria-label": "Changed options" });
    this.notes = h("div", { role: "status" });
    this.every = h("details", { class: "section every" },
      h("summary", {}, "Every option", h("span", { class: "hint" }, `all ${this.options.declared.size} of them`)),
      h("p", { class: "soft" }, "Nothing here needs to be touched. What is changed is sent, the rest is as the choices above have it."),
      this.options.element());
    this.start = h("button", { type: "submit", class: "main" }, "Start the training");
    this.checks = 0;
  }

  parts() {
    const form = h("form", { novalidate: true, onsubmit: (event) => {
      event.preventDefault();
      this.submit();
    } },
      this.subject(), this.model(), this.most(),
      this.every, this.chips, this.notes, this.summary,
      h("div", { class: "actions" }, this.start, h("a", { class: "button", href: "#/photographs" }, "Back to the photographs")));
    this.element = form;
    return [
      h("h1", { tabindex: "-1" }, "What and how"),
      h("p", { class: "lead" }, "Say what the pictures show. All else has a usual value."),
      form,
    ];
  }

  subject() {
    const names = [...this.form.subjects.filter((name) => name in SUBJECTS), ""];
    const choice = (name) => {
      const [words, hint] = SUBJECTS[name];
      const radio = h("input", { type: "radio", name: "subject", value: name, checked: draft.subject === name,
        onchange: () => this.choose(name) });
      return h("label", { class: "choice" }, radio, h("span", {}, words), h("span", { class: "hint" }, hint));
    };
    const others = this.form.presets.filter(({ name }) => !this.form.subjects.includes(name));
    const about = h("p", { class: "hint" });
    const preset = h("select", { onchange: () => {
      draft.preset = preset.value;
      tell();
      this.changed();
    } }, h("option", { value: "" }, "nothing in particular"),
      others.map(({ name }) => h("option", { value: name, selected: draft.preset === name }, name)));
    const tell = () => { about.textContent = others.find(({ name }) => name === preset.value)?.description ?? ""; };
    const shell = field("Fit to", preset, "", { name: "preset" });
    shell.append(about);
    tell();
    return [
      h("fieldset", {}, h("legend", {}, "What do the pictures show?"), h("div", { class: "choices" }, names.map(choice))),
      h("fieldset", {}, h("legend", {}, "Which model learns it?"), h("div", { class: "pair" }, this.modelField(), shell)),
    ];
  }

  choose(name) {
    for (const leaf of Object.keys(BESIDE[draft.subject] ?? {})) {
      delete draft.options[leaf];
    }
    Object.assign(draft.options, BESIDE[name] ?? {});
    draft.subject = name;
    this.options.know(this.options.values);
    this.changed();
  }

  modelField() {
    const list = h("datalist", { id: "models" }, this.form.models.map(({ name, note }) => h("option", { value: name, label: note })));
    const shell = this.main(USUAL_MODEL, "Base model", "A name from the list, or a model of the Hugging Face hub.");
    shell.querySelector("input").setAttribute("list", "models");
    shell.append(list);
    return shell;
  }

  model() {
    return h("fieldset", {}, h("legend", {}, "What is it called?"), h("div", { class: "pair" },
      this.main("instance_prompt", "What the pictures show, in words", "TOK stands for what is learnt; say it in prompts later. A picture's own caption goes before."),
      this.main("output_name", "Name of the result", "In the names of its files.")));
  }

  most() {
    const previews = this.options.declared.has("validation_prompts") && this.main("validation_prompts", "Previews on the way", "Prompts, one a line: pictures of them are made now and then.");
    return h("fieldset", {}, h("legend", {}, "How long, and how closely?"), h("div", { class: "pair" },
      this.main("max_train_steps", "Steps", "More learn more, and at some point too much."),
      this.main("rank", "Rank", "How much an adapter can hold: larger files, finer likeness.")), previews);
  }

  /** A field of the main part, for an option that is in the whole form, too. */
  main(name, label, hint) {
    const option = this.options.declared.get(name);
    const isList = option.types.includes("array");
    const control = isList ? h("textarea", { rows: 3 }) : h("input", { type: "text", autocomplete: "off", spellcheck: "false",
      inputmode: option.types.some((type) => ["integer", "number"].includes(type)) ? "decimal" : null });
    control.addEventListener("change", () => {
      const text = control.value.trim();
      const isNumber = control.inputMode === "decimal" && text !== "" && Number.isFinite(Number(text));
      const value = isList ? text.split("\n").map((line) => line.trim()).filter(Boolean) : isNumber ? Number(text) : text;
      const is_usual = String(value) === String(this.options.values[name] ?? "") && !(name in draft.options);
      this.options.set(name, is_usual || isList && !value.length ? undefined : value);
    });
    this.mains.set(name, control);
    return field(label, control, hint, { name });
  }

  changed() {
    keep();
    this.show();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.check(), CHECK_SECONDS * 1000);
  }

  show() {
    chips(this.chips, this.options);
    for (const [name, control] of this.mains) {
      if (document.activeElement !== control || name in draft.options) {
        const value = this.options.value(name);
        control.value = Array.isArray(value) ? value.join("\n") : value ?? "";
      }
    }
  }

  /** Asks the server what all this means; shows what is wrong at its field. */
  async check() {
    const number = ++this.checks;
    try {
      const { values, notes, problems } = await post("/trainer/checks", { ...submission(), pictures: [], archive: undefined });
      if (number === this.checks) {
        clearProblems(this.element);
        problems.forEach((problem) => at(this.element, problem));
        say(problems.map(({ field: name, message }) => `${name}: ${message}`).join(". "));
        this.usual(values);
        put(this.notes, notes.filter(({ kind }) => kind !== "ignored").map(({ kind, field: name, message }) =>
          h("p", { class: `note ${kind}` }, h("b", {}, name), " ", ticked(message))));
        this.show();
      }
    } catch (error) {
      if (!(error instanceof Lost)) {
        showProblems(this.element, this.summary, error);
      }
    }
  }

  /** What options are where nothing is changed: the answer without what is. */
  usual(values) {
    const kept = Object.fromEntries(Object.keys(draft.options).map((name) => [name, this.options.values[name]]));
    this.options.know({ ...this.options.values, ...values, ...kept });
  }

  async submit() {
    const lacking = !draft.pictures.length ? "there are no photographs yet; the first step takes them"
      : draft.pictures.some(({ address }) => !address) ? "not all photographs are on the server yet" : "";
    if (lacking) {
      showProblems(this.element, this.summary, new Error(lacking));
      return;
    }
    this.start.disabled = true;
    try {
      const job = await post("/trainer/trainings", submission());
      say("The training is in the queue");
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      showProblems(this.element, this.summary, error, {
        open: (name) => {
          this.every.open ||= !this.mains.has(name);
          this.options.open(name);
        },
        elsewhere: (name) => name === "images_data_url" ? "#/photographs" : "",
      });
    }
    this.start.disabled = false;
  }
}
