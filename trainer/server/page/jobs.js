// All jobs of the server: those of this page and of the services' clients.

import { get, Lost, post, wait } from "./api.js";
import { h, put, say } from "./dom.js";
import { capital } from "./problems.js";
import { kindWords, moment, serviceWords, span, stateWords } from "./words.js";

const LOOK_SECONDS = 2;
const PAGE = 50;

/** The view. */
export async function jobs(main, signal) {
  const body = h("tbody", {});
  const table = h("table", { class: "tablelike joblist", hidden: true },
    h("thead", {}, h("tr", {}, ["Job", "Asked for", "State", "Time", ""].map((text) => h("th", { scope: "col" }, text)))), body);
  const none = h("p", { class: "soft" });
  const more = h("button", { type: "button", hidden: true, onclick: () => {
    limit = Math.min(200, limit + PAGE);
    look();
  } }, "Show older ones");
  let limit = PAGE, before = "";
  put(main, h("h1", { tabindex: "-1" }, "Jobs"),
    h("p", { class: "lead" }, "All of this server, newest first: of this page and of the services' clients."), none, table,
    h("div", { class: "actions" }, more));

  async function look() {
    const told = await get(`/trainer/jobs?limit=${limit}`);
    const now = JSON.stringify(told);
    if (now === before || body.contains(document.activeElement) && document.activeElement.disabled) {
      return;
    }
    before = now;
    const focused = document.activeElement?.id;
    put(body, told.jobs.map((job) => row(job, look)));
    document.getElementById(focused)?.focus();
    table.hidden = !told.jobs.length;
    none.textContent = told.jobs.length ? "" : "There are none yet.";
    more.hidden = !told.more || limit >= 200;
  }

  while (!signal.aborted) {
    try {
      await look();
    } catch (error) {
      if (!(error instanceof Lost)) {
        throw error;
      }
    }
    await wait(LOOK_SECONDS);
  }
}

function row(job, look) {
  const isOver = !["queued", "running"].includes(job.state);
  const name = job.name || kindWords(job.kind);
  const far = job.state === "running" && job.total ? `${job.step} of ${job.total}`
    : job.state === "queued" ? `place ${job.position + 1}` : "";
  const took = isOver && job.started ? `took ${span(job.ended - job.started)}`
    : job.seconds_left !== null ? `about ${span(job.seconds_left)} left` : "";
  return h("tr", {},
    h("td", {}, h("a", { href: `#/jobs/${job.id}`, id: `open-${job.id}` }, name), job.name && h("div", { class: "hint" }, kindWords(job.kind))),
    h("td", {}, moment(job.created), h("div", { class: "hint" }, job.protocol === "page" ? "here" : `${serviceWords(job.protocol)} · ${job.app}`)),
    h("td", {}, h("span", { class: `state ${job.state}` }, stateWords(job)), far && h("span", { class: "hint number" }, ` ${far}`)),
    h("td", { class: "number" }, took),
    h("td", {}, !isOver && !job.cancel_requested && h("button", { type: "button", class: "quiet", id: `end-${job.id}`,
      "aria-label": `${job.state === "queued" ? "Take out" : "Stop"} ${name}`, onclick: async (event) => {
        event.target.disabled = true;
        try {
          await post(`/trainer/jobs/${job.id}/cancel`);
          say(`${name} is asked to end`);
          event.target.disabled = false;
          await look();
        } catch (error) {
          event.target.replaceWith(h("span", { class: "problem", role: "alert" }, capital(error.message)));
        }
      } }, job.state === "queued" ? "Take out" : "Stop")));
}
