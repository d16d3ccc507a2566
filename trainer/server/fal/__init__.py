"""What fal's protocol is made of: apps, answers, queue, storage and the JavaScript route."""
