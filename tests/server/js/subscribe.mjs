// Uploads the files of the input, trains, and waits by asking again and again.
import { say } from "./client.mjs";

await say(async ({ client, endpoint, input }) => {
  const statuses = [];
  let enqueued;
  let logs;
  const result = await client.subscribe(endpoint, {
    input,
    logs: true,
    pollInterval: 50,
    onEnqueue: (requestId) => (enqueued = requestId),
    onQueueUpdate: (update) => {
      if (statuses.at(-1) !== update.status) statuses.push(update.status);
      logs = update.logs ?? logs;
    },
  });
  return { enqueued, statuses, logs, data: result.data, requestId: result.requestId };
});
