// The server: what it is asked, the key it may ask for, and what it refuses.

const KEY = "trainer-key";
let asking = null;
let isLost = false;

/** What the server refuses: a text, and what is wrong with each field. */
export class Refused extends Error {
  constructor(status, detail, problems) {
    super(detail);
    this.status = status;
    this.problems = problems;
  }
}

/** The server does not answer. */
export class Lost extends Error {}

export const get = (path) => answered(path, {});

export const post = (path, body) => answered(path, {
  method: "POST",
  ...(body === undefined ? {} : {
    body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  }),
});

/** Shows a picture that may need the key; an image element asks without it. */
export async function show(image, path) {
  if (!key() || path.startsWith("/files/")) {
    image.src = path;
    return;
  }
  const response = await asked(path, {});
  const address = URL.createObjectURL(await response.blob());
  image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
  image.src = address;
}

/** Brings a file to the server; gives the address it has there. */
export async function upload(file, onShare) {
  for (;;) {
    const used = key();
    const { status, text } = await sent(file, onShare);
    if (status === 401) {
      await askForKey(used);
    } else if (status === 429) {
      await wait(1);
    } else if (status === 200) {
      return new URL(JSON.parse(text).access_url).pathname;
    } else {
      throw refusal(status, text);
    }
  }
}

export const wait = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

/** An address on this server, as a submission names it. */
export const whole = (path) => new URL(path, location.href).href;

function sent(file, onShare) {
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/files/upload");
    request.setRequestHeader("X-Fal-File-Name", file.name.replaceAll(/[^A-Za-z0-9._-]+/g, "-"));
    request.setRequestHeader("Content-Type", file.type || "application/octet-stream");
    if (key()) {
      request.setRequestHeader("Authorization", `Key ${key()}`);
    }
    request.upload.addEventListener("progress", (event) => onShare(event.loaded / event.total));
    request.addEventListener("load", () => {
      found(true);
      done({ status: request.status, text: request.responseText });
    });
    request.addEventListener("error", () => {
      found(false);
      fail(new Lost("the upload broke off"));
    });
    request.send(file);
  });
}

async function answered(path, options) {
  return (await asked(path, options)).json();
}

async function asked(path, options) {
  for (;;) {
    const used = key();
    const response = await reached(path, options);
    if (response.ok) {
      return response;
    }
    if (response.status === 401) {
      await askForKey(used);
    } else if (response.status === 429) {
      await wait(Number(response.headers.get("retry-after")) || 1);
    } else {
      throw refusal(response.status, await response.text());
    }
  }
}

async function reached(path, options) {
  const headers = { ...options.headers, ...(key() ? { Authorization: `Key ${key()}` } : {}) };
  try {
    const response = await fetch(path, { ...options, headers });
    found(true);
    return response;
  } catch {
    found(false);
    throw new Lost("the server does not answer");
  }
}

function refusal(status, text) {
  try {
    const { detail, problems = [] } = JSON.parse(text);
    const words = typeof detail === "string" ? detail : `the server answers ${status}`;
    return new Refused(status, words, problems);
  } catch {
    return new Refused(status, `the server answers ${status}`, []);
  }
}

/** Tells of a lost server, and of one that is back. */
function found(isThere) {
  if (isLost === !isThere) {
    return;
  }
  isLost = !isThere;
  const banner = document.getElementById("connection");
  banner.textContent = isLost ? "The server does not answer. This page goes on as soon as it does." : "";
  banner.hidden = !isLost;
}

function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Asks for another key than the one that was used, once for all that wait for it. */
async function askForKey(used) {
  if (!asking && key() !== used) {
    return;
  }
  const isWrong = Boolean(used);
  asking ??= new Promise((done) => {
    const dialog = document.getElementById("key");
    const [form, text, problem] = ["form", "#key-text", ".problem"].map((name) => dialog.querySelector(name));
    problem.textContent = isWrong ? "This is none of the server's keys." : "";
    problem.hidden = !isWrong;
    text.value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, text.value.trim());
      dialog.close();
      asking = null;
      done();
    }, { once: true });
    dialog.showModal();
  });
  await asking;
}
