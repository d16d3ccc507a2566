// One job: how far it is, what it says, what came of it.

import { get, Lost, post, show, wait } from "./api.js";
import { Chart } from "./chart.js";
import { h, put, say, ticked } from "./dom.js";
import { renew } from "./draft.js";
import { showPrepared } from "./photographs.js";
import { capital } from "./problems.js";
import { samples } from "./samples.js";
import { trials } from "./trials.js";
import { bytes, count, kindWords, moment, serviceWords, shown, span, stateWords } from "./words.js";

const LOOK_SECONDS = 1;
const NOTES = { warning: "Warning", ignored: "Without effect", yielded: "Given way", resolved: "Settled" };

/** The view of a job; `signal` ends it. */
export async function job(main, signal, id) {
  const view = new View(id, signal);
  put(main, ...view.parts());
  await view.follow();
}

class View {
  constructor(id, signal) {
    this.id = id;
    this.signal = signal;
    this.chart = new Chart();
    this.samples = [];
    this.shownSamples = 0;
    this.notes = new Map();
    this.stage = null;
    this.saidShare = -1;
    this.head = h("div", {});
    this.going = h("div", { class: "going" });
    this.outcome = h("div", {});
    this.previews = h("section", { "aria-label": "Previews" });
    this.trial = h("section", { "aria-label": "Try it" });
    this.report = h("section", { "aria-label": "Report" });
    this.told = h("section", { "aria-label": "Notes" });
    this.more = h("div", { class: "more" });
  }

  parts() {
    return [this.head, this.going, this.chart.element, this.outcome, this.previews, this.trial, this.report, this.told, this.more];
  }

  /** Asks again and again until the job is over. */
  async follow() {
    let since = "";
    while (!this.signal.aborted) {
      try {
        this.details ??= await get(`/trainer/jobs/${this.id}`);
        const told = await get(`/trainer/jobs/${this.id}/events?since=${since}`);
        since = told.next;
        this.take(told);
        if (told.more) {
          continue;
        }
        if (!["queued", "running"].includes(told.job.state)) {
          this.details = await get(`/trainer/jobs/${this.id}`);
          this.refresh(told.job);
          this.end();
          return;
        }
        this.refresh(told.job);
      } catch (error) {
        if (!(error instanceof Lost)) {
          put(this.head, h("h1", { tabindex: "-1" }, "This job is not here"), h("p", { class: "problem", role: "alert" }, capital(error.message)));
          return;
        }
      }
      await wait(LOOK_SECONDS);
    }
  }

  take({ events, restarted }) {
    if (restarted) {
      this.chart.begin();
      this.samples = [];
      this.notes.clear();
    }
    for (const event of events) {
      this.chart.take(event);
      if (event.event === "sample") {
        this.samples.push(event);
      } else if (event.event === "note") {
        this.notes.set(`${event.note} ${event.field} ${event.message}`, event);
      } else if (event.event === "stage") {
        this.stage = event.done < event.total ? event : null;
      }
    }
  }

  refresh(line) {
    this.showHead(line);
    this.showProgress(line);
    this.chart.draw();
    if (this.samples.length !== this.shownSamples) {
      this.shownSamples = this.samples.length;
      samples(this.previews, this.id, this.samples);
    }
    this.showNotes();
  }

  showHead(line) {
    const state = stateWords(line);
    if (this.headState === state) {
      return;
    }
    this.headState = state;
    const title = line.name || `${kindWords(line.kind)} of ${moment(line.created)}`;
    document.title = `${title} · trainer`;
    const isOver = !["queued", "running"].includes(line.state);
    const asked = line.protocol === "page" ? "" : ` for a client of ${serviceWords(line.protocol)}`;
    put(this.head,
      h("div", { class: "headed" }, h("h1", { tabindex: "-1" }, title), h("span", { class: `state ${line.state}` }, state)),
      h("p", { class: "soft" }, `${kindWords(line.kind)}${asked}, asked for at ${moment(line.created)}`,
        isOver && line.started && `, took ${span(line.ended - line.started)}`),
      h("div", { class: "actions" },
        !isOver && !line.cancel_requested && h("button", { type: "button", onclick: (event) => this.cancel(event.target) },
          line.state === "queued" ? "Take out of the queue" : "Stop it"),
        this.details.request?.presets && h("button", { type: "button", onclick: () => this.again() }, "Use these settings again")));
    say(`${title}: ${state}`);
  }

  showProgress(line) {
    const { state, step, total, position, seconds_left } = line;
    if (!["queued", "running"].includes(state)) {
      put(this.going);
      return;
    }
    const waiting = position ? `Waiting behind ${count(position, "job")}` : "Waiting for its turn";
    const stage = this.stage && `${capital(this.stage.stage)}: ${this.stage.done} of ${this.stage.total}`;
    const doing = state === "queued" ? waiting : step ? `Step ${step} of ${total}` : stage ?? "The job begins";
    const left = seconds_left === null ? "" : `about ${span(seconds_left)} left`;
    const bar = state === "queued" ? h("progress", { max: 1, value: 0 }) : step ? h("progress", { max: total, value: step })
      : this.stage ? h("progress", { max: this.stage.total, value: this.stage.done }) : h("progress", {});
    bar.setAttribute("aria-label", "Progress");
    put(this.going, h("p", { class: "line number" }, h("span", {}, doing, step > 0 && stage && ` · ${stage}`), h("span", { class: "soft" }, left)), bar);
    const quarter = total ? Math.floor((step / total) * 4) : 0;
    if (quarter > this.saidShare) {
      this.saidShare = quarter;
      say(doing);
    }
  }

  showNotes() {
    const all = [...this.notes.values()].map(({ note: kind, field, message }) => ({ kind, field, message }));
    const known = this.details.notes.filter((note) => !this.notes.has(`${note.kind} ${note.field} ${note.message}`));
    const every = [...known, ...all].filter(({ kind, field }) => kind !== "ignored" || field in this.details.options || field.startsWith("request."));
    if (every.length === this.shownNotes) {
      return;
    }
    this.shownNotes = every.length;
    const order = (kind) => (kind === "warning" ? 0 : 1);
    every.sort((one, other) => order(one.kind) - order(other.kind));
    put(this.told, every.length > 0 && h("h2", {}, "What to know"),
      every.map(({ kind, field, message }) => h("p", { class: `note ${kind}` },
        h("b", {}, NOTES[kind] ?? capital(kind)), `, ${field}: `, ticked(message))));
  }

  async cancel(button) {
    button.disabled = true;
    try {
      await post(`/trainer/jobs/${this.id}/cancel`);
      say("The job is asked to end");
    } catch (error) {
      button.after(h("span", { class: "problem", role: "alert" }, capital(error.message)));
    }
  }

  again() {
    renew(this.details.request);
    location.hash = "#/settings";
  }

  /** Shows all that is there at the end. */
  end() {
    const { details } = this;
    put(this.outcome, failure(details), files(details));
    if (details.kind === "generation") {
      put(this.outcome, failure(details), pictures(details));
    }
    if (details.kind === "preparation" && details.has_prepared) {
      get(`/trainer/jobs/${this.id}/prepared`).then((found) => showPrepared(this.more, this.id, found));
      return;
    }
    put(this.more, sampled(details, this.id),
      details.has_prepared && folded("Photographs as they were trained", async (box) => {
        showPrepared(box, this.id, await get(`/trainer/jobs/${this.id}/prepared`));
      }), chosen(details));
    if (details.kind === "training" && details.state === "done") {
      trials(this.trial, details, this.signal);
    }
    if (details.has_report) {
      this.showReport(this.report);
    }
  }

  async showReport(place) {
    const { address } = await post(`/trainer/jobs/${this.id}/report`);
    put(place, h("h2", {}, "Report"),
      h("iframe", { class: "report", src: address, title: "Report of the training", sandbox: "" }),
      h("p", {}, h("a", { href: address, target: "_blank", rel: "noopener" }, "Open it by itself"), " · ",
        h("a", { href: address, download: "report.html" }, "Download it")));
  }
}

function failure({ state, failure: failed }) {
  if (state === "cancelled") {
    return h("p", { class: "note" }, "It was ended before it was done.");
  }
  return failed && h("div", { class: "problem problems", role: "alert" }, h("b", {}, "It failed. "),
    failed.problems.length ? h("ul", {}, failed.problems.map(({ field, message, hint }) =>
      h("li", {}, h("b", {}, field), ": ", ticked(message), hint && h("span", { class: "hint" }, ticked(capital(hint)))))) : ticked(capital(failed.message)),
    failed.hint && h("span", { class: "hint" }, ticked(capital(failed.hint))));
}

function files({ files: all }) {
  const weights = all.filter(({ role }) => role !== "picture");
  if (!weights.length) {
    return null;
  }
  return h("section", { "aria-label": "Files" }, h("h2", {}, "Files"),
    h("table", { class: "tablelike" },
      h("thead", {}, h("tr", {}, ["What for", "File", "Size", "Read back"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, weights.map(({ meaning, name, size, address, verdicts }) => h("tr", {},
        h("td", {}, capital(meaning)),
        h("td", {}, h("a", { href: address, download: name }, name)),
        h("td", { class: "number size" }, bytes(size)),
        h("td", {}, verdicts.map(({ reader, status }) =>
          h("div", { class: status === "passed" ? "passed" : status === "failed" ? "bad" : "soft" }, `${capital(status)} · ${reader}`))))))));
}

/** Pictures of a job that made some. */
function pictures({ files: all }) {
  return h("ul", { class: "trials" }, all.map(({ address, name }) => {
    const image = h("img", { alt: name });
    show(image, address);
    return h("li", {}, h("a", { href: address, target: "_blank", rel: "noopener" }, image));
  }));
}

/** What `trainer sample` made: a row for each prompt, a column for each strength. */
function sampled({ sampled: found }, id) {
  if (!found?.pictures?.length) {
    return null;
  }
  const { prompts = [], strengths = [] } = found;
  const cell = (prompt, strength) => {
    const picture = found.pictures.find((one) => one.prompt === prompt && one.strength === strength);
    const image = picture && h("img", { alt: `${prompts[prompt].prompt}, strength ${strength}` });
    if (image) {
      show(image, `/trainer/jobs/${id}/pictures/pictures/${picture.path}`);
    }
    return h("td", {}, image, Number.isFinite(picture?.likeness) && h("span", { class: "hint number" }, `likeness ${picture.likeness.toFixed(2)}`));
  };
  return h("section", {}, h("h2", {}, "Pictures by strength"), h("div", { class: "samples", tabindex: "0", role: "region", "aria-label": "Pictures by strength" },
    h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Prompt"), strengths.map((strength) => h("th", { scope: "col" }, `Strength ${strength}`)))),
      h("tbody", {}, prompts.map(({ prompt }, row) => h("tr", {}, h("th", { scope: "row" }, prompt), strengths.map((strength) => cell(row, strength))))))));
}

function chosen({ options, ignored_options: ignored }) {
  const names = Object.keys(options);
  return names.length > 0 && folded("Settings that were chosen", (box) => put(box,
    h("dl", { class: "settings" }, names.map((name) => [h("dt", {}, name),
      h("dd", {}, shown(options[name]), ignored[name] && h("span", { class: "hint" }, ` without effect: ${ignored[name]}`))]))));
}

function folded(title, fill) {
  const box = h("div", { class: "inside" });
  return h("details", { class: "section", ontoggle: (event) => {
    if (event.target.open && !box.children.length) {
      fill(box);
    }
  } }, h("summary", {}, title), box);
}
