// What the programs beside this one share: the real client pointed at a server, and one line of
// JSON on stdout at the end, whether it went well or not.
import { File } from "node:buffer";
import { readFile } from "node:fs/promises";
import { basename } from "node:path";

import { createFalClient } from "@fal-ai/client";

/** The client, over the server's own proxy route. */
export function connect(base) {
  return createFalClient({
    credentials: process.env.FAL_KEY ?? "any:key",
    proxyUrl: { url: `${base}/api/fal/proxy`, when: "always" },
  });
}

/** The arguments that every program takes: BASE ENDPOINT INPUT [FIELD=FILE …]. */
export async function given() {
  const [base, endpoint, input, ...files] = process.argv.slice(2);
  if (input === undefined) {
    throw new Error("usage: node PROGRAM BASE ENDPOINT INPUT_AS_JSON [FIELD=FILE ...]");
  }
  const request = JSON.parse(input);
  for (const pair of files) {
    const cut = pair.indexOf("=");
    const path = pair.slice(cut + 1);
    request[pair.slice(0, cut)] = new File([await readFile(path)], basename(path), {
      type: "application/zip",
    });
  }
  return { client: connect(base), endpoint, input: request };
}

/** What a caller of the client can see of an error. */
export function seen(error) {
  return {
    name: error.name,
    message: error.message,
    status: error.status,
    body: error.body,
    requestId: error.requestId,
    fieldErrors: error.fieldErrors,
  };
}

/** Runs a program and prints what it gives, or its error. */
export async function say(program) {
  let said;
  try {
    said = await program(await given());
  } catch (error) {
    said = { error: seen(error) };
    process.exitCode = 1;
  }
  console.log(JSON.stringify(said));
}
