# consumer.pxi: included by _core.pyx
