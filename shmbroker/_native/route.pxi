# route.pxi: a topic as its producers know it.


cdef class TopicRoute:
    """A topic as a producer knows it; looked up again when the definitions have moved."""
    cdef readonly str name
    cdef readonly uint32_t topic_id
    cdef readonly uint32_t count
    cdef readonly uint32_t permission
    cdef uint64_t generation
    cdef uint32_t slots[SB_QUEUES_PER_TOPIC_MAX]


cdef TopicRoute find_route(sb_region *r, str topic):
    """None if there is no such topic."""
    cdef uint32_t slot = 0
    cdef bytes name = topic.encode()
    cdef TopicRoute route = TopicRoute.__new__(TopicRoute)
    route.name = topic
    while True:  # definitions hardly ever move while they are copied
        route.generation = sb_load(&sb_marks(r).topic_generation)
        if sb_topic_find(r, name, &slot) != SB_OK:
            return None
        route.topic_id = sb_topic_at(r, slot).topic_id
        route.permission = <uint32_t>sb_load(&sb_topic_at(r, slot).permission)
        route.count = sb_topic_queues(r, slot, route.slots, SB_QUEUES_PER_TOPIC_MAX)
        if route.generation == sb_load(&sb_marks(r).topic_generation):
            return route if route.count else None
