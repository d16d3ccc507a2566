// What is to be trained, as far as it is chosen; kept until the tab is closed.

import { whole } from "./api.js";

const PLACE = "trainer-draft";
// What a subject sets beside its preset; shown with all that is changed.
export const BESIDE = { person: { face_aware_cropping: true } };
const EMPTY = { pictures: [], subject: "person", preset: "", options: { ...BESIDE.person }, preparation: null };

/** The draft; `pictures` are {name, address, kind, caption}. */
export const draft = { ...structuredClone(EMPTY), ...kept() };

/** Keeps the draft as it is now. */
export function keep() {
  const there = draft.pictures.filter(({ address }) => address)
    .map(({ name, address, kind, caption }) => ({ name, address, kind, caption }));
  sessionStorage.setItem(PLACE, JSON.stringify({ ...draft, pictures: there }));
}

/** Begins anew, with pictures and settings of an earlier submission if there are. */
export function renew(request = {}) {
  const { pictures = [], archive = null, presets = [], options = {} } = request;
  const [subject, preset] = presets;
  Object.assign(draft, structuredClone(EMPTY), {
    pictures: [
      ...pictures.map(({ address, caption = null }) => ({ ...named(address), kind: "picture", caption })),
      ...(archive ? [{ ...named(archive), kind: "archive", caption: null }] : []),
    ],
    subject: subject ?? "",
    preset: preset ?? "",
    options: { ...options },
  });
  keep();
}

/** The draft as the server takes it. */
export function submission() {
  const archive = draft.pictures.find(({ kind }) => kind === "archive");
  const pictures = archive ? [] : draft.pictures;
  return {
    pictures: pictures.map(({ address, caption }) => ({
      address: whole(address), ...(caption ? { caption } : {}),
    })),
    ...(archive ? { archive: whole(archive.address) } : {}),
    presets: [draft.subject, draft.preset].filter(Boolean),
    options: draft.options,
  };
}

/** What decides how pictures are prepared. */
export const seenOf = (sent) => JSON.stringify({ ...sent, pictures: sent.pictures.map(({ address }) => address) });

function named(address) {
  const path = new URL(address, location.href).pathname;
  return { address: path, name: decodeURIComponent(path.split("/").pop()) };
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}
