// Numbers, times and names as people read them.

const SERVICES = { page: "this page", fal: "fal", novita: "Novita", bfl: "BFL" };
const KINDS = { training: "Training", generation: "Pictures", preparation: "Preparation" };
const STATES = {
  queued: "waiting", running: "running", done: "done", failed: "failed", cancelled: "cancelled",
};

/** Who a job was asked for by, and what it is. */
export const serviceWords = (name) => SERVICES[name] ?? name;
export const kindWords = (kind) => KINDS[kind] ?? kind;

/** Where a job stands. */
export function stateWords(job) {
  const ends = job.cancel_requested && job.state === "running";
  return ends ? "ending" : STATES[job.state];
}

/** A size in units of a thousand. */
export function bytes(size) {
  const units = ["bytes", "kB", "MB", "GB"];
  let number = size, unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

/** A span of time, roughly. */
export function span(seconds) {
  if (seconds < 90) {
    return `${Math.max(1, Math.round(seconds))} s`;
  }
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A moment, from seconds since 1970. */
export function moment(seconds) {
  const then = new Date(seconds * 1000);
  const isToday = then.toDateString() === new Date().toDateString();
  const day = isToday ? {} : { day: "numeric", month: "short" };
  return then.toLocaleString(undefined, { ...day, hour: "2-digit", minute: "2-digit" });
}

/** So many things, with the word in the right number. */
export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

/** A value as it stands in a file. */
export function shown(value) {
  if (Array.isArray(value)) {
    return value.map(shown).join(", ");
  }
  return value === null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);
}
