// What the server refuses, shown at the field at fault and together above.

import { Refused } from "./api.js";
import { h, newId, say, ticked } from "./dom.js";

/** Removes all that was shown within a place. */
export function clearProblems(place) {
  place.querySelectorAll("[data-problem]").forEach((shown) => shown.remove());
  for (const control of place.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-errormessage");
  }
}

/**
 * Shows what is wrong: at each field that is here, and all of it in a list.
 * `open` brings a field to light that is folded away.
 */
export function showProblems(place, summary, error, { open = () => {}, elsewhere = () => "" } = {}) {
  clearProblems(place);
  const problems = error instanceof Refused ? error.problems : [];
  const items = problems.map((problem) => {
    const words = h("span", {}, ticked(`${problem.message}${problem.hint ? `; ${problem.hint}` : ""}`));
    const control = at(place, problem, open);
    const way = elsewhere(problem.field);
    if (control) {
      const link = h("a", { href: `#${control.id}`, onclick: (event) => {
        event.preventDefault();
        open(problem.field.split(/[.[]/)[0]);
        control.focus();
      } }, problem.field);
      return h("li", {}, link, ": ", words);
    }
    return h("li", {}, way ? h("a", { href: way }, problem.field) : h("b", {}, problem.field), ": ", words);
  });
  const text = problems.length ? "This cannot be done yet:" : ticked(capital(error.message));
  summary.replaceChildren(h("div", { class: "problem problems", role: "alert", "data-problem": true, tabindex: "-1" },
    text, items.length > 0 && h("ul", {}, items)));
  summary.firstChild.focus({ preventScroll: true });
  summary.scrollIntoView({ block: "nearest" });
  say("");
}

/** Shows a problem at its field; gives the control, if the field is here. */
export function at(place, { field, message, hint }, open = () => {}) {
  const leaf = field.split(/[.[]/)[0];
  let holder = place.querySelector(`[data-field="${CSS.escape(leaf)}"]`);
  if (!holder) {
    open(leaf);
    holder = place.querySelector(`[data-field="${CSS.escape(leaf)}"]`);
  }
  const control = holder?.querySelector("input, select, textarea");
  if (!control) {
    return null;
  }
  control.id ||= newId("field");
  const id = newId("problem");
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-errormessage", id);
  holder.querySelectorAll("[data-problem]").forEach((shown) => shown.remove());
  holder.append(h("p", { class: "problem", id, "data-problem": true }, ticked(message), hint && h("span", { class: "hint" }, ticked(hint))));
  return control;
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
