// The form of all options, made of their declarations; only what is changed is sent.

import { h, put } from "./dom.js";
import { shown } from "./words.js";

/** Controls of all options: their values, what is changed, and where each is. */
export class Options {
  /**
   * @param sections the declarations.
   * @param changed option to value; written to as the user changes them.
   * @param onChange is told after each change.
   */
  constructor(sections, changed, onChange) {
    this.sections = sections;
    this.changed = changed;
    this.onChange = onChange;
    this.values = {};
    this.rows = new Map();
    this.declared = new Map(sections.flatMap(({ options }) => options).map((option) => [option.name, option]));
    this.holders = new Map();
  }

  /** The whole form with a search. */
  element() {
    const none = h("p", { class: "soft", hidden: true, role: "status" });
    const search = h("input", { type: "search", id: "search", placeholder: "rank, learning rate, face …", autocomplete: "off",
      oninput: () => this.filter(search.value, none) });
    return h("div", {},
      h("div", { class: "field" }, h("label", { for: "search" }, "Find an option"), search), none,
      this.sections.map((section) => this.section(section)));
  }

  section({ name, description, options }) {
    const inside = h("div", { class: "inside" }, options.map((option) => this.row(option)));
    const holder = h("details", { class: "section" },
      h("summary", {}, name, h("span", { class: "hint" }, description)), inside);
    options.forEach((option) => this.holders.set(option.name, holder));
    return holder;
  }

  row(option) {
    const id = `option-${option.name}`;
    const control = controlOf(option, id, () => this.take(option, control));
    const hint = h("p", { class: "hint", id: `${id}-hint` }, option.description);
    const allowed = h("p", { class: "hint", id: `${id}-allowed` }, `Allowed: ${option.allowed}. Usual: ${shown(option.default)}.`);
    control.setAttribute("aria-describedby", `${id}-hint ${id}-allowed`);
    const reset = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => {
      this.reset(option.name);
      control.focus();
    } }, "Take back");
    reset.setAttribute("aria-label", `Take back ${option.name}`);
    const row = h("div", { class: "option", "data-field": option.name },
      h("div", { class: "words" }, h("label", { for: id }, option.name), hint, allowed),
      h("div", { class: "control" }, control, reset));
    this.rows.set(option.name, { row, control, reset, option });
    this.show(option.name);
    return row;
  }

  /** Takes what stands in a control. */
  take(option, control) {
    const value = valueOf(option, control);
    if (value === undefined || same(value, this.values[option.name]) && !(option.name in this.changed)) {
      delete this.changed[option.name];
    } else {
      this.changed[option.name] = value;
    }
    this.show(option.name, { keepText: true });
    this.onChange();
  }

  /** Sets an option from elsewhere on the page. */
  set(name, value) {
    if (value === undefined || value === "") {
      delete this.changed[name];
    } else {
      this.changed[name] = value;
    }
    this.show(name);
    this.onChange();
  }

  reset(name) {
    this.set(name, undefined);
  }

  /** Takes note of what options are where nothing is changed. */
  know(values) {
    this.values = values;
    for (const name of this.rows.keys()) {
      this.show(name);
    }
  }

  /** What an option is now. */
  value(name) {
    return name in this.changed ? this.changed[name] : this.values[name] ?? this.declared.get(name)?.default;
  }

  show(name, { keepText = false } = {}) {
    const found = this.rows.get(name);
    if (!found) {
      return;
    }
    const isChanged = name in this.changed;
    found.row.classList.toggle("changed", isChanged);
    found.reset.hidden = !isChanged;
    if (!keepText && document.activeElement !== found.control) {
      write(found.option, found.control, this.value(name));
    }
  }

  /** Opens the section of an option. */
  open(name) {
    const holder = this.holders.get(name);
    if (holder) {
      holder.open = true;
    }
  }

  filter(text, none) {
    const words = text.toLowerCase().split(/[\s_]+/).filter(Boolean);
    let number = 0;
    for (const [name, { row, option }] of this.rows) {
      const all = `${name.replaceAll("_", " ")} ${option.description}`.toLowerCase();
      const fits = words.every((word) => all.includes(word));
      row.hidden = !fits;
      number += fits ? 1 : 0;
    }
    for (const holder of new Set(this.holders.values())) {
      const fits = [...holder.querySelectorAll(".option")].some((row) => !row.hidden);
      holder.hidden = !fits;
      holder.open = words.length > 0 && fits;
    }
    none.textContent = number ? "" : `No option has “${text}” in its name or meaning.`;
    none.hidden = number > 0;
  }
}

/** Shows what is changed, each to be taken back. */
export function chips(place, options) {
  const names = Object.keys(options.changed);
  put(place, names.map((name) => h("li", {}, `${name}: ${shown(options.changed[name])}`,
    h("button", { type: "button", "aria-label": `Take back ${name}`, onclick: () => options.reset(name) }, "×"))));
  place.hidden = !names.length;
}

function controlOf(option, id, onChange) {
  const choices = choicesOf(option);
  if (choices) {
    return h("select", { id, onchange: onChange }, choices.map(([text, words]) => h("option", { value: text }, words)));
  }
  if (option.types.includes("array")) {
    return h("textarea", { id, rows: 3, spellcheck: "false", onchange: onChange });
  }
  const isNumber = option.types.includes("number") || option.types.includes("integer");
  return h("input", { type: "text", id, inputmode: isNumber ? "decimal" : null, autocomplete: "off", spellcheck: "false", onchange: onChange });
}

/** What a select offers: texts and words. Nothing where anything may be typed. */
function choicesOf({ choices, types }) {
  const nothing = types.includes("null") ? [["", "not set"]] : [];
  if (types.includes("boolean")) {
    return [...nothing, ["true", "yes"], ["false", "no"]];
  }
  return choices && !types.includes("array") ? [...nothing, ...choices.map((text) => [text, text])] : null;
}

/** The value that stands in a control; nothing where none does. */
function valueOf(option, control) {
  const text = control.value.trim();
  if (option.types.includes("boolean")) {
    return text === "" ? null : text === "true";
  }
  if (text === "" && choicesOf(option)) {
    return null;
  }
  if (text === "") {
    return option.types.includes("string") && option.default === "" ? "" : undefined;
  }
  if (option.types.includes("null") && ["none", "null"].includes(text.toLowerCase())) {
    return null;
  }
  if (option.types.includes("array")) {
    return text.split("\n").map((line) => line.trim()).filter(Boolean);
  }
  // What is no number goes as it is: the server says what is allowed.
  const isNumber = (option.types.includes("number") || option.types.includes("integer")) && Number.isFinite(Number(text));
  return isNumber ? Number(text) : text;
}

function write(option, control, value) {
  const text = value === null || value === undefined ? "" : Array.isArray(value) ? value.join("\n") : String(value);
  control.value = text;
  if ("placeholder" in control) {
    control.placeholder = text ? "" : "not set";
  }
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

