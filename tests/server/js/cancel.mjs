// Submits, cancels as soon as the request is in the state that CANCEL_AT names, and reads the end.
import { say, seen } from "./client.mjs";

const cancelAt = process.env.CANCEL_AT ?? "IN_QUEUE";
const pause = () => new Promise((resolve) => setTimeout(resolve, 50));

await say(async ({ client, endpoint, input }) => {
  const { request_id: requestId } = await client.queue.submit(endpoint, { input });
  const statuses = [];
  let status;
  let cancelled = false;
  do {
    status = await client.queue.status(endpoint, { requestId, logs: true });
    if (statuses.at(-1) !== status.status) statuses.push(status.status);
    if (!cancelled && status.status === cancelAt) {
      await client.queue.cancel(endpoint, { requestId });
      cancelled = true;
    }
    if (status.status !== "COMPLETED") await pause();
  } while (status.status !== "COMPLETED");
  try {
    const result = await client.queue.result(endpoint, { requestId });
    return { requestId, statuses, cancelled, status, data: result.data, error: null };
  } catch (error) {
    return { requestId, statuses, cancelled, status, error: seen(error) };
  }
});
