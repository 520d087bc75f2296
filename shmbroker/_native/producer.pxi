# producer.pxi: included by _core.pyx
