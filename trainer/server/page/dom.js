// Elements, made of plain values: texts become text, never markup.

const SVG = "http://www.w3.org/2000/svg";
let numbers = 0;

/** An element; properties beginning with `on` are listeners, null and false ones are left out. */
export function h(name, properties = {}, ...children) {
  return filled(document.createElement(name), properties, children);
}

/** An element of a drawing. */
export function s(name, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, name), properties, children);
}

/** Puts other children into an element. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(isThere));
  return element;
}

/** An id that no other element has. */
export function newId(name) {
  numbers += 1;
  return `${name}-${numbers}`;
}

/** A field: its label, control, hint, and place for what is wrong with it. */
export function field(label, control, hint = "", { name = "" } = {}) {
  control.id ||= newId("field");
  const hintId = `${control.id}-hint`;
  if (hint) {
    control.setAttribute("aria-describedby", hintId);
  }
  return h("div", { class: "field", "data-field": name },
    h("label", { for: control.id }, label), control,
    hint && h("p", { class: "hint", id: hintId }, hint));
}

/** A text in whose backticks stand words of code. */
export function ticked(text) {
  return text.split(/`([^`]+)`/).map((part, place) => (place % 2 ? h("code", {}, part) : part));
}

/** Says something to those who do not see the page change. */
export function say(text) {
  const place = document.getElementById("said");
  if (place.textContent !== text) {
    place.textContent = text;
  }
}

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else if (["value", "checked", "disabled", "hidden", "selected", "max"].includes(name) && !(element instanceof SVGElement)) {
      if (value !== null && value !== undefined) {
        element[name] = value;
      }
    } else if (isThere(value) || value === "") {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat(Infinity).filter(isThere));
  return element;
}

function isThere(value) {
  return value !== null && value !== undefined && value !== false && value !== "";
}
