-- A name per request, w0 to w999, and the figures as one line of JSON.
local next = 0

function request()
  next = (next + 1) % 1000
  return wrk.format("GET", "/w" .. next .. ".services.test")
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('{"requests": %d, "seconds": %f, "failed": %d, "lost": %d, '
    .. '"micros": {"p50": %f, "p99": %f, "p99.9": %f}}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
