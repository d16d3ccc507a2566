// The first step: pictures come, are looked at, and get captions.

import { get, Lost, post, Refused, show, upload, wait } from "./api.js";
import { h, put, s, say, ticked } from "./dom.js";
import { draft, keep, seenOf, submission } from "./draft.js";
import { capital, clearProblems, showProblems } from "./problems.js";
import { count } from "./words.js";

const ARCHIVES = /\.(zip|tar|tgz|tar\.gz|gz)$/i;
const ACCEPTED = "image/*,.heic,.heif,.avif,.zip,.tar,.gz,.tgz";
const AT_ONCE = 3;
const LEVELS = { ok: "", look: "Worth a look.", act: "A training would suffer from this." };

// Files that wait for their turn, whichever view is shown meanwhile.
const waiting = [];
let underWay = 0;
let current = null;

/** The view; `signal` ends what goes on when another one is shown. */
export function photographs(main, signal) {
  const view = new View(signal);
  current = view;
  put(main, ...view.parts());
  view.refresh();
  view.goOnLooking();
}

class View {
  constructor(signal) {
    this.signal = signal;
    this.grid = h("ul", { class: "grid", "aria-label": "Your photographs" });
    this.problems = h("div", {});
    this.found = h("section", { "aria-label": "As they are trained" });
    this.look = h("button", { type: "button", onclick: () => this.prepare() }, "Look at what is trained of them");
    this.next = h("a", { class: "button main", href: "#/settings" }, "Go on: what and how");
    this.actions = h("div", { class: "actions" }, this.look, this.next);
    this.total = h("p", { class: "soft", role: "status" });
  }

  parts() {
    const input = h("input", { type: "file", id: "files", multiple: true, accept: ACCEPTED, "aria-describedby": "accepted",
      onchange: () => { this.take(input.files); input.value = ""; } });
    const drop = h("label", { class: "drop", for: "files" }, input,
      h("strong", {}, "Drop photographs here, or choose them"),
      h("span", { class: "hint", id: "accepted" }, "JPEG, PNG, WebP, HEIC and others, several at a time, or one .zip"));
    for (const [name, isOver] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
      drop.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", isOver);
        if (name === "drop") {
          this.take(event.dataTransfer.files);
        }
      });
    }
    return [
      h("h1", { tabindex: "-1" }, "Photographs"),
      h("p", { class: "lead" }, "Ten to thirty of a person, a thing or a style. They stay on the machine that this server runs on."),
      this.problems, drop, this.total, this.grid, this.actions, this.found,
    ];
  }

  /** Takes files in, a few at a time. */
  take(files) {
    clearProblems(this.problems);
    for (const file of files) {
      const kind = ARCHIVES.test(file.name) ? "archive" : "picture";
      const picture = { name: file.name, kind, caption: null, address: null, file, share: 0 };
      const others = draft.pictures.some((other) => other.kind !== kind || kind === "archive");
      if (others) {
        const text = "an archive comes alone: give one archive, or pictures one by one";
        showProblems(this.problems, this.problems, new Error(text));
        break;
      }
      draft.pictures.push(picture);
      waiting.push(picture);
    }
    this.forgetLook();
    this.refresh();
    bringNext();
  }

  remove(picture) {
    const place = draft.pictures.indexOf(picture);
    draft.pictures.splice(place, 1);
    if (waiting.includes(picture)) {
      waiting.splice(waiting.indexOf(picture), 1);
    }
    this.forgetLook();
    this.refresh();
    const buttons = this.grid.querySelectorAll("button");
    (buttons[Math.min(place, buttons.length - 1)] ?? document.getElementById("files")).focus();
    say(`${picture.name} is taken out`);
  }

  /** What was looked at is not what there is any more. */
  forgetLook() {
    draft.preparation = null;
    put(this.found);
    keep();
  }

  refresh() {
    const pictures = draft.pictures;
    put(this.grid, pictures.map((picture) => this.item(picture)));
    const left = pictures.filter((picture) => !picture.address && !picture.problem).length;
    const broken = pictures.some((picture) => picture.problem);
    const archive = pictures[0]?.kind === "archive";
    const has = archive ? "One archive" : capital(count(pictures.length, "photograph"));
    this.total.textContent = !pictures.length ? "" : left ? `${has}, ${left} on the way` : `${has} on the server`;
    this.actions.hidden = !pictures.length;
    this.look.disabled = left > 0 || broken;
    const isReady = !left && !broken;
    this.next.toggleAttribute("aria-disabled", !isReady);
  }

  item(picture) {
    const frame = h("div", { class: "frame" });
    if (picture.kind === "archive") {
      frame.append("archive");
    } else {
      const image = h("img", { alt: "", onerror: () => put(frame, picture.name.split(".").pop().toUpperCase()) });
      if (picture.file) {
        picture.local ??= URL.createObjectURL(picture.file);
        image.src = picture.local;
      } else {
        show(image, picture.address);
      }
      frame.append(image);
    }
    const bar = !picture.address && !picture.problem
      && h("progress", { max: 1, value: picture.share, "aria-label": `${picture.name} on the way` });
    picture.item = h("li", { class: "thumb" }, frame, bar,
      h("button", { type: "button", "aria-label": `Take out ${picture.name}`, onclick: () => this.remove(picture) }, "×"),
      h("p", { class: "name", title: picture.name }, picture.name),
      picture.problem && h("p", { class: "problem", role: "alert" }, picture.problem));
    return picture.item;
  }

  /** Has the server prepare the pictures, and shows what it found. */
  async prepare() {
    clearProblems(document);
    this.look.disabled = true;
    try {
      const sent = submission();
      const job = await post("/trainer/preparations", sent);
      draft.preparation = { id: job.id, of: seenOf(sent) };
      keep();
      await this.follow(job.id);
    } catch (error) {
      showProblems(this.problems, this.problems, error, { elsewhere });
    }
    this.refresh();
  }

  async goOnLooking() {
    if (draft.preparation) {
      try {
        await this.follow(draft.preparation.id);
      } catch (error) {
        draft.preparation = null;
        if (error.status !== 404) {
          showProblems(this.problems, this.problems, error, { elsewhere });
        }
      }
    }
  }

  /** Waits for a preparation, telling of it. */
  async follow(id) {
    let since = "", stage = "";
    while (!this.signal.aborted && draft.preparation?.id === id) {
      try {
        const told = await get(`/trainer/jobs/${id}/events?since=${since}`);
        since = told.next;
        stage = told.events.findLast(({ event }) => event === "stage") ?? stage;
        const { state, position } = told.job;
        if (state === "done") {
          showPrepared(this.found, id, await get(`/trainer/jobs/${id}/prepared`), { editable: true });
          if (draft.preparation.of !== seenOf(submission())) {
            this.found.firstChild.after(h("p", { class: "note warning" }, "Settings have changed since; look again to see what they do."));
          }
          say("The photographs are prepared");
          return;
        }
        if (state === "failed" || state === "cancelled") {
          await this.tellFailure(id);
          return;
        }
        put(this.found, going(stage, state === "queued" ? position : null));
      } catch (error) {
        if (!(error instanceof Lost)) {
          throw error;
        }
      }
      await wait(0.7);
    }
  }

  async tellFailure(id) {
    const { failure } = await get(`/trainer/jobs/${id}`);
    draft.preparation = null;
    put(this.found);
    const text = failure ? `${failure.message}${failure.hint ? `; ${failure.hint}` : ""}` : "the preparation was cancelled";
    showProblems(this.problems, this.problems, new Refused(422, text, failure?.problems ?? []), { elsewhere });
  }
}

function bringNext() {
  while (underWay < AT_ONCE && waiting.length) {
    underWay += 1;
    bring(waiting.shift()).finally(() => {
      underWay -= 1;
      bringNext();
    });
  }
}

async function bring(picture) {
  while (!picture.address && !picture.problem) {
    try {
      picture.address = await upload(picture.file, (share) => {
        picture.share = share;
        const bar = picture.item?.querySelector("progress");
        if (bar) {
          bar.value = share;
        }
      });
    } catch (error) {
      if (error instanceof Lost) {
        await wait(2);
      } else {
        picture.problem = capital(error.message);
      }
    }
  }
  keep();
  current.refresh();
}

const elsewhere = (name) => name === "images_data_url" ? "" : "#/settings";

function going(stage, position) {
  const text = position === null ? stage ? `${capital(stage.stage)}: ${stage.done} of ${stage.total}` : "The server begins"
    : position ? `Waiting behind ${count(position, "job")}` : "Waiting";
  const bar = h("progress", stage ? { max: stage.total, value: stage.done } : {});
  bar.setAttribute("aria-label", "Preparation");
  return h("div", { class: "going card" }, h("p", { class: "line", role: "status" }, text), bar);
}

/** Shows prepared pictures, each with what is trained of it. */
export function showPrepared(place, id, { sets }, { editable = false } = {}) {
  put(place, h("h2", {}, "As they are trained"),
    !sets.length && h("p", {}, "There is nothing to see yet."),
    sets.map((set) => h("div", {},
      set.name && h("h3", {}, capital(set.name.replaceAll("_", " "))),
      advice(set),
      set.notes.map(({ kind, message }) => h("p", { class: `note ${kind}` }, ticked(message))),
      set.left_out.map(({ name, reason }) => h("p", { class: "note warning" }, h("b", {}, plain(name)), ` is left out: ${reason}`)),
      h("ul", { class: "prepared" }, set.pictures.map((picture) => card(picture, id, editable && !set.name))),
      set.sheets.length > 0 && sheets(set.sheets, id))));
}

function advice({ level, advice: lines }) {
  return lines.length > 0 && h("div", {},
    LEVELS[level] && h("p", {}, LEVELS[level]),
    h("ul", { class: "advice" }, lines.map((line) => h("li", { class: line.level },
      h("span", { class: "topic" }, capital(line.topic)),
      h("span", {}, h("span", { class: "found" }, capital(line.found)), h("span", { class: "soft" }, ` · ${line.advice}`))))));
}

function sheets(paths, id) {
  const box = h("div", {});
  return h("details", { class: "section", ontoggle: (event) => {
    if (event.target.open && !box.children.length) {
      put(box, paths.map((path, number) => {
        const image = h("img", { alt: `Contact sheet, page ${number + 1}`, class: "sheet" });
        show(image, `/trainer/jobs/${id}/pictures/${path}`);
        return image;
      }));
    }
  } }, h("summary", {}, "Contact sheet"), h("div", { class: "inside" }, box));
}

function card(picture, id, editable) {
  const [height, width] = picture.trained_size;
  const faces = picture.faces.length;
  return h("li", { class: "card" },
    framed(picture, id),
    h("div", { class: "body" },
      h("p", { class: "name" }, plain(picture.name)),
      h("p", { class: "hint number" }, `${picture.size[1]} × ${picture.size[0]} → ${width} × ${height}`,
        faces > 0 && ` · ${count(faces, "face")}`, picture.repeats > 1 && ` · ${picture.repeats} times an epoch`,
        picture.mask && ` · mask: ${picture.mask}`),
      captionOf(picture, editable),
      h("ul", {}, picture.remarks.map(({ kind, text }) => h("li", { class: kind }, capital(text))),
        picture.each_time.map((text) => h("li", {}, capital(text))))));
}

/** The picture, with all dark that is not trained, and faces marked. */
function framed(picture, id) {
  const [height, width] = picture.size;
  const [left, top, across, down] = picture.trained_box;
  const words = `${plain(picture.name)}; trained: ${Math.round(across)} × ${Math.round(down)} from ${Math.round(left)}, ${Math.round(top)}`;
  const image = h("img", { alt: words });
  if (picture.thumbnail) {
    show(image, `/trainer/jobs/${id}/pictures/${picture.thumbnail}`);
  }
  const outside = `M0 0H${width}V${height}H0ZM${left} ${top}V${top + down}H${left + across}V${top}Z`;
  return h("div", { class: "window" }, h("div", { class: "both" }, image,
    s("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      s("path", { class: "outside", d: outside, "fill-rule": "evenodd" }),
      s("rect", { class: "kept", x: left, y: top, width: across, height: down }),
      picture.faces.map((face) => s("rect", { class: "face", x: face.left, y: face.top, width: face.width, height: face.height })))));
}

function captionOf(picture, editable) {
  const mine = editable && draft.pictures[0]?.kind === "picture" ? draft.pictures[parseInt(picture.name, 10)] : null;
  const from = picture.caption_origin.replaceAll("_", " ");
  if (!mine) {
    return h("p", {}, `“${picture.caption}”`, h("span", { class: "hint" }, ` ${from}`));
  }
  // What a model wrote is what is trained, not what it would write another time.
  if (picture.caption_origin === "generated") {
    mine.caption ??= picture.caption;
  }
  const id = `caption-${parseInt(picture.name, 10)}`;
  const text = h("textarea", { id, rows: 2, value: mine.caption ?? picture.caption, onchange: () => {
    mine.caption = text.value.trim() && (text.value.trim() !== picture.caption || mine.caption) ? text.value.trim() : null;
    keep();
  } });
  return h("div", { class: "field" }, h("label", { class: "hint", for: id }, `Caption (${from})`), text);
}

/** A picture's name without the number that it has in its list. */
const plain = (name) => name.replace(/^\d{3,}-/, "");

