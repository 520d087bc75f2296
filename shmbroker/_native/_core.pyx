# cython: language_level=3, freethreading_compatible=False
"""Binding of the native core: convert, drop the GIL where it may wait, call, map codes to errors. No policy.

One extension module, one file per object: see the includes.
"""

cimport cython

include "record.pxi"
include "scan.pxi"
include "native.pxi"
include "progress.pxi"
include "ids.pxi"
include "marks.pxi"
include "timer.pxi"
include "limits.pxi"
include "errors.pxi"
include "region.pxi"
include "client.pxi"
include "message.pxi"
include "arguments.pxi"
include "route.pxi"
include "producer.pxi"
include "filter.pxi"
include "received.pxi"
include "orderly.pxi"
include "reader.pxi"
include "member.pxi"
include "consumer.pxi"
include "hub.pxi"
include "pull.pxi"
include "move.pxi"
include "lane.pxi"
include "push.pxi"
