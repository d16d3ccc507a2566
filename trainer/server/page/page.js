// Which view is shown, by what stands behind # in the address.

import { get, Lost } from "./api.js";
import { h, put } from "./dom.js";
import { job } from "./job.js";
import { jobs } from "./jobs.js";
import { photographs } from "./photographs.js";
import { capital } from "./problems.js";
import { settings } from "./settings.js";

const VIEWS = [
  [/^#\/photographs$/, "#/photographs", "Photographs", photographs],
  [/^#\/settings$/, "#/settings", "What and how", settings],
  [/^#\/training$/, "#/training", "Training", latest],
  [/^#\/jobs$/, "#/jobs", "Jobs", jobs],
  [/^#\/jobs\/([0-9a-f-]{36})$/, "#/training", "Job", job],
];

const main = document.getElementById("main");
let ending = new AbortController();
let isFirst = true;

/** The newest training that this page began. */
async function latest(place, signal) {
  const { jobs: all } = await get("/trainer/jobs?limit=200");
  const found = all.find(({ protocol, kind }) => protocol === "page" && kind === "training");
  if (signal.aborted) {
    return;
  }
  if (found) {
    await job(place, signal, found.id);
    return;
  }
  put(place, h("h1", { tabindex: "-1" }, "Training"), h("p", { class: "lead" }, "None has begun yet."),
    h("p", {}, h("a", { class: "button main", href: "#/photographs" }, "Begin with photographs")));
}

async function route() {
  const [found, view] = VIEWS.map((one) => [location.hash.match(one[0]), one]).find(([match]) => match) ?? [];
  if (!found) {
    history.replaceState(null, "", "#/photographs");
    return route();
  }
  const [, place, title, fill] = view;
  ending.abort();
  ending = new AbortController();
  const { signal } = ending;
  document.title = `${title} · trainer`;
  for (const link of document.querySelectorAll(".top nav a")) {
    link.toggleAttribute("aria-current", link.getAttribute("href") === place);
    if (link.hasAttribute("aria-current")) {
      link.setAttribute("aria-current", "page");
    }
  }
  put(main);
  window.scrollTo(0, 0);
  const filled = fill(main, signal, found[1]);
  focusTitle();
  isFirst = false;
  try {
    await filled;
  } catch (error) {
    if (!signal.aborted) {
      const text = error instanceof Lost ? "the server does not answer" : error.message;
      main.append(h("p", { class: "problem", role: "alert" }, capital(text)));
    }
  }
  return undefined;
}

function focusTitle() {
  if (!isFirst) {
    (main.querySelector("h1") ?? main).focus({ preventScroll: true });
  }
}

window.addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
route();
