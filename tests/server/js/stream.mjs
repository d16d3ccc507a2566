// Trains, and waits by the stream of events, as `subscribe` with its mode "streaming" and as a
// second listener that reads the stream itself.
import { say } from "./client.mjs";

await say(async ({ client, endpoint, input }) => {
  const statuses = [];
  const events = [];
  let listener;
  let logs;
  const result = await client.subscribe(endpoint, {
    input,
    logs: true,
    mode: "streaming",
    onEnqueue: (requestId) => {
      listener = listen(client, endpoint, requestId, events);
    },
    onQueueUpdate: (update) => {
      if (statuses.at(-1) !== update.status) statuses.push(update.status);
      logs = update.logs ?? logs;
    },
  });
  const last = await listener;
  return { statuses, logs, events, last, data: result.data, requestId: result.requestId };
});

async function listen(client, endpoint, requestId, events) {
  const stream = await client.queue.streamStatus(endpoint, { requestId, logs: true });
  for await (const event of stream) events.push(event);
  return stream.done();
}
