package control

import "math"

// Closed acknowledged of an output stream says that nobody will read it any
// more: the shim closes its end of the pipe, so that the job's next write
// fails as it would have without a capsule, and the stream ends.
const Closed = math.MaxUint64
