// Sends an input that is refused, at once or by the result, and prints the error as callers see it.
import { say, seen } from "./client.mjs";

await say(async ({ client, endpoint, input }) => {
  try {
    const result = await client.subscribe(endpoint, { input, pollInterval: 50 });
    return { error: null, data: result.data };
  } catch (error) {
    const fields = (error.fieldErrors ?? []).map((field) => field.loc.at(-1));
    const named = fields.map((field) => [field, error.getFieldErrors(field)]);
    return { error: seen(error), named: Object.fromEntries(named) };
  }
});
